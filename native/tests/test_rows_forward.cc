// Compares RowsForward with mean, m2 and y in long double.

#include <cmath>
#include <limits>
#include <string>

#include "arrays.h"
#include "check.h"
#include "kernels.h"
#include "oracle.h"

namespace normjax::test {
namespace {

constexpr Index kRows[] = {1, 2, 3, 5, 7, 13, 97, 101};
constexpr Index kLengths[] = {1,  2,  3,  7,    8,    9,    15,   16,  17,
                              31, 97, 1024, 1025, 2047, 2048, 2049, 5003};

struct Case {
  Index rows, n;
  bool centered = true, scale = true, bias = true, streams = false;
  Index shift = 1;  // The offset of all arrays from a multiple of 64 bytes, in entries.
  double mean = 0, deviation = 1, epsilon = 1e-5;
  bool summed = false;  // The divisor is 1: y is divided by the root of m2.

  double divisor() const { return summed ? 1 : n; }

  std::string name() const {
    return text("rows", rows, "n", n, "centered", centered, "scale", scale, "bias", bias, "streams",
                streams, "shift", shift, "mean", mean, "deviation", deviation, "summed", summed);
  }
};

template <class T>
struct Arrays {
  using A = Accumulator<T>;
  Input<T> x;
  Input<A> scale, bias;
  Output<T> y;
  Output<A> mean, m2;

  explicit Arrays(const Case& c)
      : x(c.rows * c.n, c.shift),
        scale(c.scale ? c.n : 0, c.shift),
        bias(c.bias ? c.n : 0, c.shift),
        y(c.rows * c.n, c.shift),
        mean(c.rows, c.shift),
        m2(c.rows, c.shift) {
    fill(x, c.rows * 10007 + c.n, c.mean, c.deviation);
    fill(scale, c.n, 1, 0.5);
    fill(bias, c.n + 1, 0.5, 1);
  }

  void run(const Case& c, int threads = 2) {
    const RowsForward<T> in{c.rows,
                            c.n,
                            c.centered,
                            c.streams,
                            static_cast<A>(c.divisor()),
                            static_cast<A>(c.epsilon),
                            x.data(),
                            scale.data(),
                            bias.data(),
                            y.data(),
                            mean.data(),
                            m2.data()};
    normjax::run(in, shared_pool(threads));
    CHECK(y.intact() && mean.intact() && m2.intact(), c.name());
  }

  bool same_results(const Arrays& other) const {
    return y.same_bits(other.y) && mean.same_bits(other.mean) && m2.same_bits(other.m2);
  }

  bool same_row(const Arrays& other, Index row, Index n) const {
    return y.same_bits(other.y, row * n, row * n + n) && mean.same_bits(other.mean, row, row + 1) &&
           m2.same_bits(other.m2, row, row + 1);
  }
};

template <class T>
Moments row_moments(const T* x, const Case& c) {
  Moments found;
  for (Index i = 0; c.centered && i < c.n; ++i) found.mean += real(x[i]);
  found.mean /= c.n;
  for (Index i = 0; i < c.n; ++i) {
    const Real d = real(x[i]) - found.mean;
    found.m2 += d * d;
  }
  return found;
}

template <class T>
void check_row(const Case& c, const Arrays<T>& a, Index row) {
  using A = Accumulator<T>;
  const T *x = a.x.data() + row * c.n, *y = a.y.data() + row * c.n;
  const Moments m = row_moments(x, c);
  CHECK(std::abs(a.mean[row] - m.mean) <= (c.centered ? mean_tolerance<A>(m, c.n) : 0), c.name(),
        "row", row, "expected", m.mean, "found", a.mean[row]);
  CHECK(std::abs(a.m2[row] - m.m2) <= m2_tolerance<A>(m, c.n, false), c.name(), "row", row,
        "expected", m.m2, "found", a.m2[row]);
  const Real divisor = c.divisor(), epsilon = static_cast<A>(c.epsilon);
  const Real inverse = 1 / std::sqrt(m.m2 / divisor + epsilon);
  for (Index i = 0; i < c.n; ++i) {
    const Real scale = c.scale ? a.scale[i] : 1, bias = c.bias ? a.bias[i] : 0;
    const Real normalized = (real(x[i]) - m.mean) * inverse, expected = normalized * scale + bias;
    const Real allowed = y_tolerance<T>(m.mean, inverse, normalized, scale, bias, expected);
    CHECK(std::abs(real(y[i]) - expected) <= allowed, c.name(), "row", row, "i", i, "expected",
          expected, "found", real(y[i]), "allowed", allowed);
  }
}

template <class T>
void check_case(const Case& c) {
  Arrays<T> a(c);
  a.run(c);
  for (Index row = 0; row < c.rows; ++row) check_row(c, a, row);
}

Case any_options(Index rows, Index n, Random& random) {
  Case c{rows, n};
  c.centered = random.coin();
  c.scale = random.coin();
  c.bias = random.coin();
  c.streams = random.coin();
  c.summed = random.coin();
  c.shift = random.below(2);
  return c;
}

template <class T>
void test_sizes() {
  Random random(1);
  for (Index rows : kRows) {
    for (Index n : kLengths) {
      // Many long rows test nothing more than a few do.
      if (rows * n < 120000) check_case<T>(any_options(rows, n, random));
    }
  }
  // More rows than one work item has.
  check_case<T>(any_options(20011, 3, random));
  check_case<T>(any_options(2503, 16, random));
}

template <class T>
void test_options() {
  for (int bits = 0; bits < 16; ++bits) {
    for (Index n : {1, 17, 1025}) {
      Case c{9, n};
      c.centered = bits & 1;
      c.scale = bits & 2;
      c.bias = bits & 4;
      c.summed = bits & 8;
      check_case<T>(c);
    }
  }
}

template <class T>
void test_no_rows() {
  const Case c{0, 17};
  Arrays<T> a(c);
  a.run(c);
}

template <class T>
void test_large_mean() {
  for (Index n : {2, 97, 1024, 1025, 2049, 5003}) {
    Case c{9, n};
    c.mean = 1e4;
    check_case<T>(c);
  }
}

// If all squares are equal, the rounding errors of their sum have the same sign. They must not
// accumulate over a long row.
template <class T>
void test_long_rows() {
  for (bool centered : {false, true}) {
    Case c{2, 1 << 17};
    c.centered = centered;
    Arrays<T> a(c);
    for (Index i = 0; i < a.x.size(); ++i) a.x[i] = nearest<T>(i % 2 == 0 ? 1.1 : -1.1);
    a.run(c);
    for (Index row = 0; row < c.rows; ++row) check_row(c, a, row);
  }
}

// If all entries of a row are equal, y is the bias.
template <class T>
void check_bias(const Case& c, const Arrays<T>& a) {
  for (Index row = 0; row < c.rows; ++row) {
    for (Index i = 0; i < c.n; ++i) {
      const Real expected = real(nearest<T>(a.bias[i])), found = real(a.y[row * c.n + i]);
      CHECK(found == expected, c.name(), "row", row, "i", i, "expected", expected, "found", found);
    }
  }
}

// All entries are equal: the mean is exact, and m2 is 0.
template <class T>
void check_constant(Case c, double value) {
  c.mean = value;
  c.deviation = 0;
  Arrays<T> a(c);
  a.run(c);
  for (Index row = 0; row < c.rows; ++row) {
    CHECK(a.m2[row] == 0 && a.mean[row] == real(a.x[0]), c.name(), a.mean[row], a.m2[row]);
  }
  check_bias(c, a);
}

template <class T>
void test_constants() {
  // For larger values the square of the rounding error of a mean would overflow.
  for (double value : {0.0, 0.1, 1e4, -7.3, 1e22, 3e-39, 1e150, 1e-12}) {
    if (!std::isfinite(real(nearest<T>(value)))) continue;
    for (Index rows : {1, 5}) {
      for (Index n : kLengths) check_constant<T>({rows, n}, value);
    }
  }
}

// If one entry of row 5 is not finite, neither are its results. Other rows are unchanged.
template <class T>
void check_not_finite(const Case& c, Index place, double value) {
  constexpr Index kRow = 5;
  Arrays<T> clean(c), a(c);
  clean.run(c);
  a.x[kRow * c.n + place] = nearest<T>(value);
  a.run(c);
  for (Index row = 0; row < c.rows; ++row) {
    if (row != kRow) CHECK(a.same_row(clean, row, c.n), c.name(), "row", row, "value", value);
  }
  CHECK(!std::isfinite(a.mean[kRow]) && std::isnan(a.m2[kRow]), c.name(), a.mean[kRow], a.m2[kRow]);
  for (Index i = kRow * c.n; i < (kRow + 1) * c.n; ++i) {
    CHECK(std::isnan(real(a.y[i])), c.name(), "i", i, "value", value, "found", real(a.y[i]));
  }
}

template <class T>
void test_not_finite() {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (double value : {std::nan(""), kInfinity, -kInfinity}) {
    for (Index n : {1, 3, 97, 1025, 2049}) {
      for (Index place : {Index{0}, n / 2, n - 1}) check_not_finite<T>({11, n}, place, value);
    }
  }
}

// Without a mean, an infinite entry becomes inf / inf = NaN; the others are divided by infinity.
template <class T>
void test_infinity_without_mean() {
  Case c{6, 97};
  c.centered = false;
  Arrays<T> clean(c), a(c);
  clean.run(c);
  a.x[4 * c.n + 50] = nearest<T>(std::numeric_limits<double>::infinity());
  a.run(c);
  for (Index row = 0; row < c.rows; ++row) {
    if (row != 4) CHECK(a.same_row(clean, row, c.n), c.name(), "row", row);
  }
  CHECK(std::isinf(a.m2[4]) && a.mean[4] == 0, c.name(), a.m2[4], a.mean[4]);
  for (Index i = 0; i < c.n; ++i) {
    const Real y = real(a.y[4 * c.n + i]);
    CHECK(i == 50 ? std::isnan(y) : y == real(nearest<T>(a.bias[i])), c.name(), "i", i, "y", y);
  }
}

// If m2 overflows, it is infinite and not NaN.
template <class T>
void test_overflow() {
  const double large = std::is_same_v<T, double> ? 1e200 : 1e30;
  if (!std::isfinite(real(nearest<T>(large)))) return;
  for (Index n : {2, 97, 1024, 2049, 5003}) {
    Case c{5, n};
    c.deviation = large;
    Arrays<T> a(c);
    a.run(c);
    for (Index row = 0; row < c.rows; ++row) {
      const Moments m = row_moments(a.x.data() + row * n, c);
      CHECK(std::abs(a.mean[row] - m.mean) <= mean_tolerance<Accumulator<T>>(m, n), c.name(),
            a.mean[row], m.mean);
      CHECK(std::isinf(a.m2[row]) && a.m2[row] > 0, c.name(), a.m2[row]);
    }
    check_bias(c, a);
  }
}

template <class T>
void test_denormals() {
  for (bool bias : {false, true}) {
    for (Index n : {1, 17, 97, 1025, 2049}) {
      Case c{5, n};
      c.bias = bias;
      Arrays<T> a(c);
      fill_with_denormals(a.x, n);
      a.run(c);
      for (Index row = 0; row < c.rows; ++row) check_row(c, a, row);
    }
  }
}

constexpr Case kBitwise[] = {{101, 97}, {13, 1025}, {7, 2049}, {97, 1024}, {3, 5003}, {20011, 3}};

template <class T>
void test_streams_and_offsets() {
  for (Case c : kBitwise) {
    c.shift = 0;
    Arrays<T> plain(c);
    plain.run(c);
    for (Index shift : {0, 1, 3}) {
      for (bool streams : {false, true}) {
        c.shift = shift;
        c.streams = streams;
        Arrays<T> a(c);
        a.run(c);
        CHECK(a.same_results(plain), c.name());
      }
    }
  }
}

template <class T>
void test_threads() {
  for (Case c : kBitwise) {
    Arrays<T> one(c);
    one.run(c, 1);
    for (int threads : {2, 3, 8}) {
      Arrays<T> a(c);
      a.run(c, threads);
      CHECK(a.same_results(one), c.name(), "threads", threads);
    }
  }
}

}  // namespace

void test_rows_forward(Suite& suite) {
  for_each_dtype([&](auto type) {
    using T = decltype(type);
    const std::string name = std::string("rows forward: ") + Dtype<T>::name;
    suite.test(name + ", sizes", test_sizes<T>);
    suite.test(name + ", options", test_options<T>);
    suite.test(name + ", no rows", test_no_rows<T>);
    suite.test(name + ", mean 1e4", test_large_mean<T>);
    suite.test(name + ", long rows", test_long_rows<T>);
    suite.test(name + ", constants", test_constants<T>);
    suite.test(name + ", not finite", test_not_finite<T>);
    suite.test(name + ", infinity without mean", test_infinity_without_mean<T>);
    suite.test(name + ", squares beyond the range", test_overflow<T>);
    suite.test(name + ", denormals", test_denormals<T>);
    suite.test(name + ", streams and offsets", test_streams_and_offsets<T>);
    suite.test(name + ", threads", test_threads<T>);
  });
}

}  // namespace normjax::test
