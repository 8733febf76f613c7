// The shapes for the tests of the kernels over columns.

#ifndef NORMJAX_TESTS_COLUMNS_CASES_H_
#define NORMJAX_TESTS_COLUMNS_CASES_H_

#include <string>
#include <vector>

#include "arrays.h"
#include "check.h"
#include "columns.h"

namespace normjax::test {

struct ColumnsCase {
  Index examples, rows, features, groups, blocks;
  bool scale = true, bias = true, streams = false;
  Index shift = 1;  // The offset of all arrays from a multiple of 64 bytes, in entries.
  double mean = 0, deviation = 1, epsilon = 1e-5;
  bool propagates = true;  // Whether the backward kernel computes dx.

  Index entries() const { return rows * features; }
  Index size() const { return features / groups; }
  Index count() const { return rows * size(); }

  template <class T>
  Pieces pieces() const {
    return Pieces(rows, features, blocks, kLanes<Accumulator<T>>);
  }

  std::string name() const {
    return text("examples", examples, "rows", rows, "features", features, "groups", groups,
                "blocks", blocks, "scale", scale, "bias", bias, "streams", streams, "shift", shift,
                "mean", mean, "deviation", deviation, "propagates", propagates);
  }
};

inline Index any_divisor(Index n, Random& random) {
  std::vector<Index> divisors;
  for (Index d = 1; d <= n; ++d) {
    if (n % d == 0) divisors.push_back(d);
  }
  return divisors[random.below(divisors.size())];
}

inline ColumnsCase with_any_options(ColumnsCase c, Random& random) {
  c.groups = any_divisor(c.features, random);
  c.scale = random.coin();
  c.bias = random.coin();
  c.streams = random.coin();
  c.shift = random.below(2);
  c.propagates = random.below(4) != 0;
  return c;
}

// Run one of kOneOf cases. The thread sanitizer is slow, and races do not depend on the size.
#ifdef NORMJAX_TEST_THREADS
constexpr std::size_t kOneOf = 5;
#else
constexpr std::size_t kOneOf = 1;
#endif

template <class Check>
void for_each_case(const std::vector<ColumnsCase>& cases, const Check& check) {
  for (std::size_t i = 0; i < cases.size(); i += kOneOf) check(cases[i]);
}

// All numbers of features, with various rows and blocks: one block, several, numbers that do not
// divide the rows, and more blocks than rows.
inline std::vector<ColumnsCase> sizes() {
  struct Rows {
    Index rows, blocks;
  };
  constexpr Rows kFew[] = {{1, 1}, {1, 3}, {2, 1}, {3, 5}, {5, 2}, {7, 3}, {13, 4}};
  constexpr Rows kMany[] = {{64, 9}, {101, 150}, {97, 1}, {97, 6}};
  constexpr Index kExamples[] = {1, 2, 3, 5};
  Random random(3);
  std::vector<ColumnsCase> all;
  for (Index features : {1, 2, 3, 5, 7, 8, 13, 32, 64, 97, 255, 256, 257, 1023, 1024, 1025, 2050}) {
    const auto add = [&](Rows rows, Index examples) {
      all.push_back(with_any_options({examples, rows.rows, features, 1, rows.blocks}, random));
    };
    for (Rows rows : kFew) add(rows, kExamples[random.below(4)]);
    for (Rows rows : kMany) {
      if (rows.rows * features < 30000) add(rows, kExamples[random.below(4)]);
    }
    if (features > 300) add({67, 5}, 1);
  }
  // Blocks with many wide rows.
  all.push_back(with_any_options({1, 10007, 3, 1, 1}, random));
  all.push_back(with_any_options({1, 10007, 3, 1, 13}, random));
  return all;
}

// Large examples with many blocks.
template <class T>
std::vector<ColumnsCase> large_sizes() {
  Random random(4);
  std::vector<ColumnsCase> all;
  const auto add = [&](Index examples, Index features, Index blocks) {
    const Index rows = Index{(512 << 10) / sizeof(T)} / features + 1;
    all.push_back(with_any_options({examples, rows, features, 1, blocks}, random));
  };
  add(2, 64, 9);
  add(1, 3, 17);
  add(5, 257, 8);
  add(1, 2050, 40);
  add(3, 1025, 5);
  return all;
}

// Cases for bitwise comparisons: with and without folded rows, small and large.
template <class T>
std::vector<ColumnsCase> bitwise_sizes() {
  constexpr Index kLarge = Index{(512 << 10) / sizeof(T)};
  return {{3, 101, 3, 1, 6},     {2, 97, 32, 4, 13},  {5, 13, 255, 255, 2},
          {1, 67, 1025, 205, 9}, {2, 64, 1024, 8, 3}, {2, kLarge / 24 + 1, 24, 2, 50}};
}

}  // namespace normjax::test

#endif  // NORMJAX_TESTS_COLUMNS_CASES_H_
