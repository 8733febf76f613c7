// Compares ColumnsMoments and ColumnsForward with mean, m2 and y in long double.

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "arrays.h"
#include "check.h"
#include "columns_cases.h"
#include "kernels.h"
#include "oracle.h"

namespace normjax::test {
namespace {

using Case = ColumnsCase;

template <class T>
struct Arrays {
  using A = Accumulator<T>;
  Input<T> x;
  Input<A> scale, bias;
  Output<T> y;
  Output<A> mean, m2, parts, vectors;     // Of ColumnsForward
  Output<A> each_mean, each_m2, own_parts;  // Of ColumnsMoments

  explicit Arrays(const Case& c)
      : x(c.examples * c.entries(), c.shift),
        scale(c.scale ? c.features : 0, c.shift),
        bias(c.bias ? c.features : 0, c.shift),
        y(x.size(), c.shift),
        mean(c.examples * c.groups, c.shift),
        m2(mean.size(), c.shift),
        parts(c.examples * c.blocks * 2 * c.features, c.shift),
        vectors(c.examples * 3 * c.features, c.shift),
        each_mean(c.examples * c.features, c.shift),
        each_m2(each_mean.size(), c.shift),
        own_parts(parts.size(), c.shift) {
    fill(x, c.rows * 10007 + c.features, c.mean, c.deviation);
    fill(scale, c.features, 1, 0.5);
    fill(bias, c.features + 1, 0.5, 1);
  }

  void run(const Case& c, int threads = 2) {
    ThreadPool& pool = shared_pool(threads);
    normjax::run(ColumnsMoments<T>{c.examples, c.pieces<T>(), x.data(), each_mean.data(),
                                   each_m2.data(), own_parts.data()},
                 pool);
    normjax::run(
        ColumnsForward<T>{c.examples, c.groups, c.streams, c.pieces<T>(),
                          static_cast<A>(c.epsilon), x.data(), scale.data(), bias.data(), y.data(),
                          mean.data(), m2.data(), parts.data(), vectors.data()},
        pool);
    CHECK(each_mean.intact() && each_m2.intact() && own_parts.intact(), c.name());
    CHECK(y.intact() && mean.intact() && m2.intact() && parts.intact() && vectors.intact(),
          c.name());
  }

  bool same_results(const Arrays& other) const {
    return y.same_bits(other.y) && mean.same_bits(other.mean) && m2.same_bits(other.m2) &&
           each_mean.same_bits(other.each_mean) && each_m2.same_bits(other.each_m2);
  }
};

// The moments of each group of an example.
template <class T>
std::vector<Moments> moments_of(const T* x, const Case& c, Index groups) {
  const Index size = c.features / groups;
  const Real count = static_cast<Real>(c.rows) * size;
  std::vector<Moments> found(groups);
  const auto for_each_entry = [&](auto body) {
    for (Index r = 0; r < c.rows; ++r) {
      const T* row = x + r * c.features;
      for (Moments& m : found) {
        for (Index k = 0; k < size; ++k) body(m, real(*row++));
      }
    }
  };
  for_each_entry([](Moments& m, Real value) { m.mean += value; });
  for (Moments& m : found) m.mean /= count;
  for_each_entry([](Moments& m, Real value) { m.m2 += (value - m.mean) * (value - m.mean); });
  return found;
}

template <class A>
void check_moments(const Case& c, const std::vector<Moments>& expected, Real count,
                   const Array<A>& mean, const Array<A>& m2, Index example) {
  const Index groups = expected.size();
  for (Index g = 0; g < groups; ++g) {
    const Moments& m = expected[g];
    const A found_mean = mean[example * groups + g], found_m2 = m2[example * groups + g];
    CHECK(std::abs(found_mean - m.mean) <= mean_tolerance<A>(m, count), c.name(), "example",
          example, "of", groups, "group", g, "expected", m.mean, "found", found_mean);
    CHECK(std::abs(found_m2 - m.m2) <= m2_tolerance<A>(m, count, true), c.name(), "example",
          example, "of", groups, "group", g, "expected", m.m2, "found", found_m2);
  }
}

template <class T>
void check_y(const Case& c, const std::vector<Moments>& moments, const Arrays<T>& a,
             Index example) {
  const Real epsilon = static_cast<Accumulator<T>>(c.epsilon);
  for (Index k = 0; k < c.features; ++k) {
    const Moments& m = moments[k / c.size()];
    const Real inverse = 1 / std::sqrt(m.m2 / c.count() + epsilon);
    const Real scale = c.scale ? a.scale[k] : 1, bias = c.bias ? a.bias[k] : 0;
    for (Index r = 0; r < c.rows; ++r) {
      const Index i = example * c.entries() + r * c.features + k;
      const Real normalized = (real(a.x[i]) - m.mean) * inverse;
      const Real expected = normalized * scale + bias, found = real(a.y[i]);
      const Real allowed = y_tolerance<T>(m.mean, inverse, normalized, scale, bias, expected);
      CHECK(std::abs(found - expected) <= allowed, c.name(), "example", example, "row", r,
            "feature", k, "expected", expected, "found", found, "allowed", allowed);
    }
  }
}

template <class T>
void check_results(const Case& c, const Arrays<T>& a) {
  for (Index e = 0; e < c.examples; ++e) {
    const T* x = a.x.data() + e * c.entries();
    const std::vector<Moments> groups = moments_of(x, c, c.groups);
    check_moments(c, groups, c.count(), a.mean, a.m2, e);
    check_moments(c, moments_of(x, c, c.features), c.rows, a.each_mean, a.each_m2, e);
    check_y(c, groups, a, e);
  }
}

template <class T>
void check_case(const Case& c) {
  Arrays<T> a(c);
  a.run(c);
  check_results(c, a);
}

template <class T>
void test_sizes() {
  for_each_case(sizes(), check_case<T>);
}

template <class T>
void test_large_sizes() {
  for_each_case(large_sizes<T>(), check_case<T>);
}

template <class T>
void test_options() {
  for (int bits = 0; bits < 4; ++bits) {
    for (Index groups : {1, 2, 12}) {
      Case c{2, 29, 12, groups, 3};
      c.scale = bits & 1;
      c.bias = bits & 2;
      check_case<T>(c);
    }
  }
}

template <class T>
void test_no_examples() {
  const Case c{0, 5, 3, 1, 2};
  Arrays<T> a(c);
  a.run(c);
}

template <class T>
void test_large_mean() {
  std::vector<Case> cases;
  for (Index features : {1, 3, 64, 257, 1025}) {
    for (Index groups : {Index{1}, features}) {
      for (Index blocks : {1, 4, 30}) {
        cases.push_back({2, 97, features, groups, blocks});
        cases.back().mean = 1e4;
      }
    }
  }
  for_each_case(cases, check_case<T>);
}

// Sums around the first row, which is far from the mean, would lose digits.
template <class T>
void test_outlier() {
  for (Index features : {3, 64, 257}) {
    const Case c{1, 4001, features, 1, 16};
    Arrays<T> a(c);
    for (Index k = 0; k < features; ++k) a.x[k] = nearest<T>(1e4);
    a.run(c);
    check_results(c, a);
  }
}

// If all entries are equal, y is the bias.
template <class T>
void check_bias(const Case& c, const Arrays<T>& a) {
  for (Index r = 0; r < c.examples * c.rows; ++r) {
    for (Index k = 0; k < c.features; ++k) {
      const Real expected = real(nearest<T>(a.bias[k])), found = real(a.y[r * c.features + k]);
      CHECK(found == expected, c.name(), "row", r, "feature", k, "expected", expected, "found",
            found);
    }
  }
}

// All entries are equal: the mean is exact, and m2 is 0.
template <class T>
void check_constant(const Case& c) {
  using A = Accumulator<T>;
  Arrays<T> a(c);
  a.run(c);
  const auto check = [&](const Array<A>& mean, const Array<A>& m2, const char* kernel) {
    for (Index i = 0; i < mean.size(); ++i) {
      CHECK(m2[i] == 0 && mean[i] == real(a.x[0]), kernel, c.name(), "mean", mean[i], "m2", m2[i]);
    }
  };
  check(a.each_mean, a.each_m2, "moments");
  check(a.mean, a.m2, "forward");
  check_bias(c, a);
}

template <class T>
void test_constants(std::vector<double> values) {
  std::vector<Case> cases;
  for (double value : values) {
    if (!std::isfinite(real(nearest<T>(value)))) continue;
    for (Index features : {1, 3, 8, 97, 257}) {
      for (Index groups : {Index{1}, features}) {
        for (Index blocks : {1, 3, 9}) {
          cases.push_back({2, 103, features, groups, blocks});
          cases.back().mean = value;
          cases.back().deviation = 0;
        }
      }
    }
  }
  for_each_case(cases, check_constant<T>);
}

// If entry `place` of the second example is not finite, neither are the moments of its column and
// the results of its group. All other results are unchanged.
template <class T>
void check_not_finite(const Case& c, Index place, double value) {
  const Index at = c.entries() + place, column = c.features + place % c.features;
  const Index group = c.groups + place % c.features / c.size();
  Arrays<T> clean(c), a(c);
  clean.run(c);
  a.x[at] = nearest<T>(value);
  a.run(c);
  for (Index i = 0; i < a.each_mean.size(); ++i) {
    const bool kept = a.each_mean.same_bits(clean.each_mean, i, i + 1) &&
                      a.each_m2.same_bits(clean.each_m2, i, i + 1);
    CHECK(i == column ? std::isnan(a.each_m2[i]) && !std::isfinite(a.each_mean[i]) : kept, c.name(),
          "column", i, a.each_mean[i], a.each_m2[i]);
  }
  for (Index i = 0; i < a.mean.size(); ++i) {
    const bool kept =
        a.mean.same_bits(clean.mean, i, i + 1) && a.m2.same_bits(clean.m2, i, i + 1);
    CHECK(i == group ? std::isnan(a.m2[i]) && !std::isfinite(a.mean[i]) : kept, c.name(), "group",
          i, a.mean[i], a.m2[i]);
  }
  for (Index i = 0; i < a.y.size(); ++i) {
    const Index own = i / c.entries() * c.groups + i % c.features / c.size();
    CHECK(own == group ? std::isnan(real(a.y[i])) : a.y.same_bits(clean.y, i, i + 1), c.name(),
          "i", i, "found", real(a.y[i]));
  }
}

template <class T>
void test_not_finite() {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (double value : {std::nan(""), kInfinity, -kInfinity}) {
    for (Case c : {Case{3, 29, 6, 3, 4}, Case{3, 29, 13, 13, 2}, Case{2, 29, 257, 257, 3},
                   Case{2, 7, 1030, 103, 2}}) {
      for (Index place : {Index{0}, c.entries() / 2, c.entries() - 1}) {
        check_not_finite<T>(c, place, value);
      }
    }
  }
}

// If m2 overflows, it is infinite and not NaN.
template <class T>
void test_overflow() {
  const double large = std::is_same_v<T, double> ? 1e200 : 1e30;
  if (!std::isfinite(real(nearest<T>(large)))) return;
  for (Case c : {Case{2, 29, 6, 3, 4}, Case{2, 29, 257, 257, 1}, Case{1, 300, 5, 5, 2}}) {
    c.deviation = large;
    Arrays<T> a(c);
    a.run(c);
    const auto infinite = [](auto m2) { return std::isinf(m2) && m2 > 0; };
    for (Index i = 0; i < a.m2.size(); ++i) CHECK(infinite(a.m2[i]), c.name(), a.m2[i]);
    for (Index i = 0; i < a.each_m2.size(); ++i) CHECK(infinite(a.each_m2[i]), c.name(), i);
    for (Index i = 0; i < a.each_mean.size(); ++i) {
      const Moments m = moments_of(a.x.data() + i / c.features * c.entries(), c,
                                   c.features)[i % c.features];
      CHECK(std::abs(a.each_mean[i] - m.mean) <= mean_tolerance<Accumulator<T>>(m, c.rows),
            c.name(), a.each_mean[i], m.mean);
    }
    check_bias(c, a);
  }
}

template <class T>
void test_denormals() {
  for (bool bias : {false, true}) {
    for (Case c : {Case{2, 29, 6, 3, 4}, Case{2, 29, 257, 257, 3}, Case{1, 300, 5, 5, 2}}) {
      c.bias = bias;
      Arrays<T> a(c);
      fill_with_denormals(a.x, c.rows);
      a.run(c);
      check_results(c, a);
    }
  }
}

template <class T>
void test_streams_and_offsets() {
  for_each_case(bitwise_sizes<T>(), [](Case c) {
    c.shift = 0;
    Arrays<T> plain(c);
    plain.run(c);
    for (Index shift : {0, 1}) {
      for (bool streams : {false, true}) {
        c.shift = shift;
        c.streams = streams;
        Arrays<T> a(c);
        a.run(c);
        CHECK(a.same_results(plain), c.name());
      }
    }
  });
}

template <class T>
void test_threads() {
  for (Case c : bitwise_sizes<T>()) {
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

void test_columns_forward(Suite& suite) {
  for_each_dtype([&](auto type) {
    using T = decltype(type);
    const std::string name = std::string("columns forward: ") + Dtype<T>::name;
    suite.test(name + ", sizes", test_sizes<T>);
    suite.test(name + ", sizes beyond a cache", test_large_sizes<T>);
    suite.test(name + ", options", test_options<T>);
    suite.test(name + ", no examples", test_no_examples<T>);
    suite.test(name + ", mean 1e4", test_large_mean<T>);
    suite.test(name + ", an outlier in the first row", test_outlier<T>);
    suite.test(name + ", constants", [] { test_constants<T>({0, 0.1, 1e4, -7.3, 3e-39}); });
    suite.test(name + ", constants of extreme scale",
               [] { test_constants<T>({1e22, 1e150, 1e-12}); });
    suite.test(name + ", not finite", test_not_finite<T>);
    suite.test(name + ", squares beyond the range", test_overflow<T>);
    suite.test(name + ", denormals", test_denormals<T>);
    suite.test(name + ", streams and offsets", test_streams_and_offsets<T>);
    suite.test(name + ", threads", test_threads<T>);
  });
}

}  // namespace normjax::test
