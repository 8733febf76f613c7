// Compares RowsBackward with the formulas of dx, dscale and dbias in long double.

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "arrays.h"
#include "check.h"
#include "kernels.h"
#include "oracle.h"

namespace normjax::test {
namespace {

constexpr Index kRows[] = {1, 2, 3, 5, 7, 13, 97, 101};
constexpr Index kLengths[] = {1,  2,  3,  7,    8,    9,    15,   16,  17,
                              31, 97, 1024, 1025, 2047, 2048, 2049, 5003};
constexpr Index kBlocks[] = {1, 2, 3, 8, 105};

struct Case {
  Index rows, n, blocks = 1;
  bool centered = true, scale = true, affine = true, streams = false;
  Index shift = 1;
  double mean = 0, deviation = 1, epsilon = 1e-5;
  bool summed = false;

  double divisor() const { return summed ? 1 : n; }

  std::string name() const {
    return text("rows", rows, "n", n, "blocks", blocks, "centered", centered, "scale", scale,
                "affine", affine, "streams", streams, "shift", shift, "mean", mean, "deviation",
                deviation, "summed", summed);
  }
};

Real square(Real value) { return value * value; }

template <class T>
struct Arrays {
  using A = Accumulator<T>;
  Input<T> dy, x;
  Input<A> mean, inverse, scale;
  Output<T> dx;
  Output<A> dscale, dbias, parts;

  explicit Arrays(const Case& c)
      : dy(c.rows * c.n, c.shift),
        x(c.rows * c.n, c.shift),
        mean(c.rows, c.shift),
        inverse(c.rows, c.shift),
        scale(c.scale ? c.n : 0, c.shift),
        dx(c.rows * c.n, c.shift),
        dscale(c.affine ? c.n : 0, c.shift),
        dbias(c.affine ? c.n : 0, c.shift),
        parts(c.affine ? c.blocks * 2 * c.n : 0, c.shift) {
    fill(dy, c.rows * 10007 + c.n + 1, 0.1, 1);
    fill(x, c.rows * 10007 + c.n, c.mean, c.deviation);
    fill(scale, c.n, 1, 0.5);
    for (Index row = 0; row < c.rows; ++row) measure(c, row);
  }

  // Like the results of the forward kernel.
  void measure(const Case& c, Index row) {
    const T* own = x.data() + row * c.n;
    Real sum = 0, m2 = 0;
    for (Index i = 0; c.centered && i < c.n; ++i) sum += real(own[i]);
    for (Index i = 0; i < c.n; ++i) m2 += square(real(own[i]) - sum / c.n);
    mean[row] = static_cast<A>(sum / c.n);
    inverse[row] = static_cast<A>(1 / std::sqrt(m2 / c.divisor() + c.epsilon));
  }

  void run(const Case& c, int threads = 2) {
    const RowsBackward<T> in{c.rows,
                             c.n,
                             c.blocks,
                             c.centered,
                             c.streams,
                             static_cast<A>(c.divisor()),
                             dy.data(),
                             x.data(),
                             mean.data(),
                             inverse.data(),
                             scale.data(),
                             dx.data(),
                             dscale.data(),
                             dbias.data(),
                             parts.data()};
    normjax::run(in, shared_pool(threads));
    CHECK(dx.intact() && dscale.intact() && dbias.intact() && parts.intact(), c.name());
  }

  bool same_results(const Arrays& other) const {
    return dx.same_bits(other.dx) && dscale.same_bits(other.dscale) &&
           dbias.same_bits(other.dbias);
  }
};

// The means in the formula of dx: of g and of g times normalized x, over the n entries of a row.
struct RowSums {
  Real g = 0, products = 0, g_magnitude = 0, product_magnitude = 0;
};

template <class T>
struct Terms {
  Real g, d, normalized;

  Terms(const Case& c, const Arrays<T>& a, Index row, Index i) {
    g = real(a.dy[row * c.n + i]) * (c.scale ? Real{a.scale[i]} : 1);
    d = real(a.x[row * c.n + i]) - a.mean[row];
    normalized = d * a.inverse[row];
  }
};

template <class T>
RowSums row_sums(const Case& c, const Arrays<T>& a, Index row) {
  RowSums sums;
  for (Index i = 0; i < c.n; ++i) {
    const Terms<T> t(c, a, row, i);
    sums.g += t.g;
    sums.g_magnitude += std::abs(t.g);
    sums.products += t.g * t.normalized;
    sums.product_magnitude += std::abs(t.g * t.normalized);
  }
  return sums;
}

// The variance is m2 / divisor. The divisor of the mean is always n.
template <class T>
void check_row(const Case& c, const Arrays<T>& a, Index row, Real slack = 1) {
  const RowSums sums = row_sums(c, a, row);
  const Real divisor = c.divisor(), inverse = a.inverse[row];
  const Real mean = c.centered ? sums.g / c.n : 0;
  const Real mean_magnitude = c.centered ? sums.g_magnitude / c.n : 0;
  for (Index i = 0; i < c.n; ++i) {
    const Terms<T> t(c, a, row, i);
    const Real expected = inverse * (t.g - mean - t.normalized * (sums.products / divisor));
    const Real magnitude = std::abs(t.g) + mean_magnitude +
                           std::abs(t.normalized) * (sums.product_magnitude / divisor);
    const Real found = real(a.dx[row * c.n + i]);
    const Real allowed = slack * dx_tolerance<T>(inverse, t.d, magnitude, expected);
    CHECK(std::abs(found - expected) <= allowed, c.name(), "row", row, "i", i, "expected", expected,
          "found", found, "allowed", allowed);
  }
}

template <class T>
void check_affine(const Case& c, const Arrays<T>& a) {
  using A = Accumulator<T>;
  for (Index i = 0; i < c.n; ++i) {
    Real dscale = 0, dbias = 0, scale_magnitude = 0, bias_magnitude = 0;
    for (Index row = 0; row < c.rows; ++row) {
      const Real dy = real(a.dy[row * c.n + i]);
      const Real product = dy * Terms<T>(c, a, row, i).normalized;
      dscale += product;
      dbias += dy;
      scale_magnitude += std::abs(product);
      bias_magnitude += std::abs(dy);
    }
    CHECK(std::abs(a.dscale[i] - dscale) <= sum_tolerance<A>(c.rows, scale_magnitude), c.name(),
          "i", i, "expected", dscale, "found", a.dscale[i]);
    CHECK(std::abs(a.dbias[i] - dbias) <= sum_tolerance<A>(c.rows, bias_magnitude), c.name(), "i",
          i, "expected", dbias, "found", a.dbias[i]);
  }
}

template <class T>
void check_case(const Case& c) {
  Arrays<T> a(c);
  a.run(c);
  for (Index row = 0; row < c.rows; ++row) check_row(c, a, row);
  if (c.affine) check_affine(c, a);
}

Case any_options(Index rows, Index n, Random& random) {
  Case c{rows, n};
  c.blocks = kBlocks[random.below(5)];
  c.centered = random.coin();
  c.scale = random.coin();
  c.affine = random.coin();
  c.streams = random.coin();
  c.shift = random.below(2);
  return c;
}

template <class T>
void test_sizes() {
  Random random(2);
  for (Index rows : kRows) {
    for (Index n : kLengths) {
      // Many long rows test nothing more than a few do.
      if (rows * n < 120000) check_case<T>(any_options(rows, n, random));
    }
  }
  check_case<T>(any_options(5003, 3, random));
}

template <class T>
void test_options() {
  for (int bits = 0; bits < 8; ++bits) {
    for (Index n : {1, 17, 1025}) {
      Case c{9, n, 2};
      c.centered = bits & 1;
      c.scale = bits & 2;
      c.affine = bits & 4;
      check_case<T>(c);
    }
  }
}

template <class T>
void test_summed(bool centered) {
  for (Index n : {1, 2, 17, 1025, 2049}) {
    Case c{9, n, 2};
    c.centered = centered;
    c.summed = true;
    check_case<T>(c);
  }
}

template <class T>
void test_blocks() {
  for (Index rows : kRows) {
    for (Index blocks : kBlocks) check_case<T>({rows, 67, blocks});
  }
}

// Sums over zero rows are zero.
template <class T>
void test_no_rows() {
  const Case c{0, 17, 3};
  Arrays<T> a(c);
  a.run(c);
  for (Index i = 0; i < c.n; ++i) CHECK(a.dscale[i] == 0 && a.dbias[i] == 0, "i", i);
}

template <class T>
void test_large_mean() {
  for (Index n : {2, 97, 1025, 2049, 5003}) {
    Case c{9, n, 2};
    c.mean = 1e4;
    check_case<T>(c);
  }
}

// If all terms of a sum are equal, the rounding errors have the same sign. They must not accumulate
// over a long row. The 512 additions of a lane may be off by 512 / 4 eps.
template <class T>
void test_long_rows() {
  constexpr Real kSlack = 128 / kRoundings;
  Case c{2, 1 << 17};
  c.scale = false;
  Arrays<T> a(c);
  for (Index i = 0; i < a.x.size(); ++i) {
    a.x[i] = nearest<T>(i % 2 == 0 ? 1.1 : -1.1);
    a.dy[i] = nearest<T>(i % 2 == 0 ? 1.7 : 0.3);
  }
  a.run(c);
  for (Index row = 0; row < c.rows; ++row) check_row(c, a, row, kSlack);
}

// If one entry of row 5 in x or dy is not finite, only dx of that row and the sums of that column
// are not finite.
template <class T>
void check_not_finite(const Case& c, Index place, double value, bool in_x) {
  constexpr Index kRow = 5;
  Arrays<T> clean(c), a(c);
  clean.run(c);
  (in_x ? a.x : a.dy)[kRow * c.n + place] = nearest<T>(value);
  a.run(c);
  for (Index i = 0; i < a.dx.size(); ++i) {
    const bool own = i / c.n == kRow;
    CHECK(own ? !std::isfinite(real(a.dx[i])) : a.dx.same_bits(clean.dx, i, i + 1), c.name(), "i",
          i, "found", real(a.dx[i]));
  }
  for (Index i = 0; i < c.n; ++i) {
    const bool kept = a.dbias.same_bits(clean.dbias, i, i + 1);
    CHECK(i == place && !in_x ? !std::isfinite(a.dbias[i]) : kept, c.name(), "i", i, a.dbias[i]);
    CHECK(i == place ? !std::isfinite(a.dscale[i]) : a.dscale.same_bits(clean.dscale, i, i + 1),
          c.name(), "i", i, a.dscale[i]);
  }
}

template <class T>
void test_not_finite() {
  for (double value : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    for (Index n : {1, 3, 97, 1025, 2049}) {
      for (bool in_x : {false, true}) check_not_finite<T>({11, n, 2}, n / 2, value, in_x);
    }
  }
}

// Standard deviations of 1e13 and 1e-13: the third power of the inverse is out of range in float.
template <class T>
void test_extreme_scales() {
  for (double deviation : {1e13, 1e-13}) {
    if (std::is_same_v<T, Float16>) continue;
    for (Index n : {17, 97, 1025}) {
      Case c{9, n, 2};
      c.deviation = deviation;
      c.epsilon = 0;
      check_case<T>(c);
    }
  }
}

template <class T>
void test_denormals() {
  for (Index n : {1, 17, 97, 1025}) {
    const Case c{9, n, 2};
    Arrays<T> a(c);
    fill_with_denormals(a.dy, n);
    a.run(c);
    for (Index row = 0; row < c.rows; ++row) check_row(c, a, row);
    check_affine(c, a);
  }
}

constexpr Case kBitwise[] = {
    {101, 97, 7}, {13, 1025, 4}, {7, 2049, 3}, {97, 1024, 5}, {3, 5003, 8}};

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

void test_rows_backward(Suite& suite) {
  for_each_dtype([&](auto type) {
    using T = decltype(type);
    const std::string name = std::string("rows backward: ") + Dtype<T>::name;
    suite.test(name + ", sizes", test_sizes<T>);
    suite.test(name + ", options", test_options<T>);
    suite.test(name + ", summed", [] { test_summed<T>(false); });
    suite.test(name + ", summed around the mean", [] { test_summed<T>(true); });
    suite.test(name + ", blocks", test_blocks<T>);
    suite.test(name + ", no rows", test_no_rows<T>);
    suite.test(name + ", mean 1e4", test_large_mean<T>);
    // Sums of double cannot continue in a wider dtype.
    if (!std::is_same_v<T, double>) suite.test(name + ", long rows", test_long_rows<T>);
    suite.test(name + ", not finite", test_not_finite<T>);
    suite.test(name + ", extreme scales", test_extreme_scales<T>);
    suite.test(name + ", denormals", test_denormals<T>);
    suite.test(name + ", streams and offsets", test_streams_and_offsets<T>);
    suite.test(name + ", threads", test_threads<T>);
  });
}

}  // namespace normjax::test
