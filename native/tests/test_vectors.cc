// Tests of loads, stores and sums of vectors.

#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "arrays.h"
#include "check.h"
#include "formats.h"
#include "vectors.h"

namespace normjax {

template <class T>
void load_all(const T* from, Index n, Accumulator<T>* to) {
  using A = Accumulator<T>;
  map_vectors<A>(n, [&](Index i, auto part) NORMJAX_INLINE_LAMBDA {
    store(to + i, load(from + i, part), part);
  });
}

template <class T>
void store_all(const Accumulator<T>* from, Index n, T* to) {
  using A = Accumulator<T>;
  map_vectors<A>(n, [&](Index i, auto part) NORMJAX_INLINE_LAMBDA {
    store(to + i, load(from + i, part), part);
  });
}

template <class T>
void stream_all(const Accumulator<T>* from, Index n, T* to) {
  using A = Accumulator<T>;
  map_vectors<A>(n, [&](Index i, auto part) NORMJAX_INLINE_LAMBDA {
    stream(to + i, load(from + i, part), part);
  });
  finish_streams();
}

namespace test {
namespace {

// While it exists, the thread treats denormal numbers as zero, as some programs do.
class DenormalsAsZero {
 public:
#ifdef __SSE2__
  DenormalsAsZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~DenormalsAsZero() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

template <class T>
std::vector<T> all_patterns() {
  std::vector<T> all(65536);
  for (int i = 0; i < 65536; ++i) all[i].bits = static_cast<std::uint16_t>(i);
  return all;
}

template <class T>
void check_loaded(const std::vector<float>& loaded) {
  for (int i = 0; i < 65536; ++i) {
    const float expected = static_cast<float>(decode(i, Dtype<T>::format)), found = loaded[i];
    const bool same = std::isnan(expected)
                          ? std::isnan(found) && std::signbit(found) == std::signbit(expected)
                          : bits_of(found) == bits_of(expected);
    CHECK(same, "pattern", i, "expected", expected, "found", found);
  }
}

template <class T>
std::vector<float> loaded_by_twos(const std::vector<T>& patterns) {
  std::vector<float> loaded(patterns.size());
  for (Index i = 0; i < Index(patterns.size()); i += 2) load_all(&patterns[i], 2, &loaded[i]);
  return loaded;
}

template <class T>
void test_loads() {
  const std::vector<T> patterns = all_patterns<T>();
  std::vector<float> loaded(patterns.size());
  load_all(patterns.data(), patterns.size(), loaded.data());
  check_loaded<T>(loaded);
  check_loaded<T>(loaded_by_twos(patterns));
}

template <class T>
void test_loads_with_denormals_as_zero() {
  const std::vector<T> patterns = all_patterns<T>();
  std::vector<float> loaded(patterns.size());
  {
    [[maybe_unused]] DenormalsAsZero mode;
    load_all(patterns.data(), patterns.size(), loaded.data());
  }
  check_loaded<T>(loaded);
}

// Low halves of floats where a rounding may fail: near ties when 16 or 13 bits are rounded off, for
// all values of the bits above.
std::vector<std::uint32_t> low_halves() {
  std::vector<std::uint32_t> all = {0x7fff, 0x8000, 0x8001, 0xffff};
  for (std::uint32_t high = 0; high < 0x10000; high += 0x2000) {
    for (std::uint32_t low : {0x0000, 0x0001, 0x0fff, 0x1000, 0x1001, 0x1fff}) {
      all.push_back(high | low);
    }
  }
  return all;
}

// NaN stays NaN and keeps its sign. BFloat16 keeps the high bits of its payload.
template <class T>
bool stored_right(std::uint32_t from, std::uint16_t found) {
  const std::uint16_t expected = encode(from, Dtype<T>::format);
  if (!std::isnan(float_of(from))) return found == expected;
  const bool nan = std::isnan(decode(found, Dtype<T>::format));
  const bool quiet = (found >> (Dtype<T>::format.fraction_bits - 1)) & 1;
  const bool payload = std::is_same_v<T, Float16> || found == ((from >> 16) | 0x40);
  return nan && quiet && payload && (found & 0x8000) == (expected & 0x8000);
}

template <class T>
void check_stored(const std::vector<float>& from, const std::vector<T>& stored) {
  for (std::size_t i = 0; i < from.size(); ++i) {
    CHECK(stored_right<T>(bits_of(from[i]), stored[i].bits), "float", bits_of(from[i]), from[i],
          "expected", encode(bits_of(from[i]), Dtype<T>::format), "found", stored[i].bits);
  }
}

// All high halves of floats, which include all exponents, infinities and kinds of NaN.
template <class T, class Check>
void for_each_batch_of_floats(Check check) {
  const std::vector<std::uint32_t> lows = low_halves();
  std::vector<float> from;
  for (std::uint32_t high = 0; high < 0x10000; ++high) {
    for (std::uint32_t low : lows) from.push_back(float_of((high << 16) | low));
    if (high % 64 != 63) continue;
    check(from);
    from.clear();
  }
}

template <class T>
void test_stores() {
  for_each_batch_of_floats<T>([](const std::vector<float>& from) {
    std::vector<T> stored(from.size());
    store_all(from.data(), from.size(), stored.data());
    check_stored(from, stored);
  });
}

template <class T>
void test_random_stores() {
  Random random(1);
  std::vector<float> from(100001);
  for (float& value : from) value = float_of(static_cast<std::uint32_t>(random.bits()));
  std::vector<T> stored(from.size());
  store_all(from.data(), from.size(), stored.data());
  check_stored(from, stored);
}

template <class T>
void test_stores_with_denormals_as_zero() {
  for_each_batch_of_floats<T>([](const std::vector<float>& from) {
    std::vector<T> stored(from.size());
    {
      [[maybe_unused]] DenormalsAsZero mode;
      store_all(from.data(), from.size(), stored.data());
    }
    check_stored(from, stored);
  });
}

template <class T>
void test_round_trip() {
  const std::vector<T> patterns = all_patterns<T>();
  std::vector<float> loaded(patterns.size());
  std::vector<T> stored(patterns.size());
  load_all(patterns.data(), patterns.size(), loaded.data());
  store_all(loaded.data(), loaded.size(), stored.data());
  for (int i = 0; i < 65536; ++i) {
    if (!std::isnan(loaded[i])) CHECK(stored[i].bits == i, "pattern", i, "found", stored[i].bits);
  }
}

// Checks the reference conversions with known values.
void test_reference() {
  CHECK(encode(bits_of(65504.0f), kFloat16) == 0x7bff, "largest");
  CHECK(encode(bits_of(65519.996f), kFloat16) == 0x7bff, "below the tie");
  CHECK(encode(bits_of(65520.0f), kFloat16) == 0x7c00, "tie to infinity");
  CHECK(encode(bits_of(0x1p-24f), kFloat16) == 1, "least");
  CHECK(encode(bits_of(0x1p-25f), kFloat16) == 0, "tie to zero");
  CHECK(encode(bits_of(0x1.8p-24f), kFloat16) == 2, "tie to even");
  CHECK(encode(bits_of(-1.0f), kFloat16) == 0xbc00, "minus one");
  CHECK(encode(bits_of(1.0f), kBFloat16) == 0x3f80, "one");
  CHECK(encode(0x7f7fffff, kBFloat16) == 0x7f80, "largest float");
  CHECK(encode(1, kBFloat16) == 0, "least float");
  CHECK(encode(0x8000, kBFloat16) == 0, "tie to zero");
  CHECK(encode(0x8001, kBFloat16) == 1, "above the tie");
  CHECK(decode(0x0001, kFloat16) == 0x1p-24, "least");
  CHECK(decode(0x03ff, kFloat16) == 1023 * 0x1p-24, "largest denormal");
  CHECK(decode(0x0001, kBFloat16) == 0x1p-133, "least");
}

template <class T>
void test_parts() {
  using A = Accumulator<T>;
  Input<T> x(kLanes<A>, 1);
  fill(x, 2, 0, 1);
  for (int lanes = 1; lanes < kLanes<A>; ++lanes) {
    Input<T> few(lanes, 1);
    for (Index i = 0; i < lanes; ++i) few[i] = x[i];
    const Vector<A> v = load(few.data(), Partial{lanes}, A{3});
    Output<T> stored(lanes, 1);
    store(stored.data(), v, Partial{lanes});
    CHECK(stored.same_bits(few) && stored.intact(), "lanes", lanes);
    for (Index i = lanes; i < kLanes<A>; ++i) CHECK(v[i] == 3, "lanes", lanes, "lane", i, v[i]);
    const Vector<A> all = load(x.data(), Full{}), last = load(x.data(), Tail{lanes}, A{3});
    for (Index i = 0; i < kLanes<A>; ++i) {
      CHECK(last[i] == (i < lanes ? A{3} : all[i]), "skipped", lanes, "lane", i, last[i]);
    }
  }
}

template <class T>
void test_streams() {
  using A = Accumulator<T>;
  // Only whole cache lines are streamed.
  for (Index n : {1, 3, 64, 1024}) {
    Input<A> from(n, 0);
    fill(from, n, 0, 1);
    Output<T> stored(n, 0), streamed(n, 0);
    store_all(from.data(), n, stored.data());
    stream_all(from.data(), n, streamed.data());
    CHECK(stored.same_bits(streamed) && streamed.intact(), "n", n);
  }
}

template <class A>
void test_totals() {
  Vector<A> slots[4], one[1];
  for (Index s = 0; s < 4; ++s) {
    for (Index i = 0; i < kLanes<A>; ++i) slots[s][i] = static_cast<A>(1 << (i + s));
  }
  one[0] = slots[2];
  const A all = (1 << kLanes<A>) - 1;
  CHECK(total<A>(slots[0]) == all, total<A>(slots[0]));
  CHECK((total_of_slots<A>(slots)) == all * 15, total_of_slots<A>(slots));
  CHECK((total_of_slots<A>(one)) == all * 4, total_of_slots<A>(one));
}

struct Range {
  Index begin, end;
};

Range lanes_of(Full, Index full) { return {0, full}; }
Range lanes_of(Tail part, Index full) { return {part.skipped, full}; }
Range lanes_of(Partial part, Index) { return {0, part.lanes}; }

template <class A, class Loop>
void check_loop(Index n, Loop loop) {
  std::vector<int> seen(n);
  const auto mark = [&](Index i, Range lanes) {
    for (Index k = lanes.begin; k < lanes.end; ++k) ++seen.at(i + k);
  };
  loop(mark);
  for (Index i = 0; i < n; ++i) CHECK(seen[i] == 1, "n", n, "i", i, "seen", seen[i]);
}

template <class A>
void test_loops() {
  for (Index n = 0; n < 70; ++n) {
    check_loop<A>(n, [n](auto mark) {
      for_each_vector<A>(n, [&](Index i, auto part) { mark(i, lanes_of(part, kLanes<A>)); });
    });
    check_loop<A>(n, [n](auto mark) {
      for_each_vector_in_turns<A, 4>(n, [&](Index i, auto part, auto slot) {
        CHECK(slot() >= 0 && slot() < 4, slot());
        mark(i, lanes_of(part, kLanes<A>));
      });
    });
    std::vector<A> squares(n);
    map_vectors<A>(n, [&](Index i, auto part) {
      const Range lanes = lanes_of(part, kLanes<A>);
      for (Index k = i + lanes.begin; k < i + lanes.end; ++k) squares.at(k) = static_cast<A>(k * k);
    });
    for (Index i = 0; i < n; ++i) CHECK(squares[i] == i * i, "n", n, "i", i, squares[i]);
  }
}

template <class T>
void test_half(Suite& suite) {
  const std::string name = std::string("vectors: ") + Dtype<T>::name;
  suite.test(name + ", every pattern loads", test_loads<T>);
  suite.test(name + ", every pattern loads where denormals are zero",
             test_loads_with_denormals_as_zero<T>);
  suite.test(name + ", stores round to nearest even", test_stores<T>);
  suite.test(name + ", stores of random floats", test_random_stores<T>);
  suite.test(name + ", stores where denormals are zero", test_stores_with_denormals_as_zero<T>);
  suite.test(name + ", round trip", test_round_trip<T>);
}

}  // namespace

void test_vectors(Suite& suite) {
  suite.test("vectors: reference of half precision", test_reference);
  test_half<BFloat16>(suite);
  test_half<Float16>(suite);
  for_each_dtype([&](auto type) {
    using T = decltype(type);
    const std::string name = std::string("vectors: ") + Dtype<T>::name;
    suite.test(name + ", first lanes", test_parts<T>);
    suite.test(name + ", streams", test_streams<T>);
  });
  suite.test("vectors: float, totals", test_totals<float>);
  suite.test("vectors: double, totals", test_totals<double>);
  suite.test("vectors: float, loops", test_loops<float>);
  suite.test("vectors: double, loops", test_loops<double>);
}

}  // namespace test
}  // namespace normjax
