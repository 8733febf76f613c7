// Compares ColumnsBackward with the sums of dy and of dy (x - mean) and the formula of dx, all in
// long double.

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
  Input<T> dy, x;
  Input<A> mean, inverse, scale;
  Output<T> dx;
  Output<A> sums, parts, vectors;

  explicit Arrays(const Case& c)
      : dy(c.examples * c.entries(), c.shift),
        x(dy.size(), c.shift),
        mean(c.examples * c.groups, c.shift),
        inverse(mean.size(), c.shift),
        scale(c.scale ? c.features : 0, c.shift),
        dx(c.propagates ? dy.size() : 0, c.shift),
        sums(c.examples * 2 * c.features, c.shift),
        parts(c.examples * c.blocks * 2 * c.features, c.shift),
        vectors(c.examples * 4 * c.features, c.shift) {
    fill(dy, c.rows * 10007 + c.features + 1, 0.1, 1);
    fill(x, c.rows * 10007 + c.features, c.mean, c.deviation);
    fill(scale, c.features, 1, 0.5);
    for (Index e = 0; e < c.examples; ++e) measure(c, e);
  }

  // Close to the results of the forward kernel. As inputs here they count as exact.
  void measure(const Case& c, Index example) {
    std::vector<double> sum(c.groups), squares(c.groups);
    const T* entry = x.data() + example * c.entries();
    for (Index r = 0; r < c.rows; ++r) {
      for (Index g = 0; g < c.groups; ++g) {
        for (Index k = 0; k < c.size(); ++k) {
          const double d = real(*entry++) - c.mean;
          sum[g] += d;
          squares[g] += d * d;
        }
      }
    }
    for (Index g = 0; g < c.groups; ++g) {
      const double rest = sum[g] / c.count(), variance = squares[g] / c.count() - rest * rest;
      mean[example * c.groups + g] = static_cast<A>(c.mean + rest);
      inverse[example * c.groups + g] =
          static_cast<A>(1 / std::sqrt(std::max(variance, 0.0) + c.epsilon));
    }
  }

  void run(const Case& c, int threads = 2) {
    const ColumnsBackward<T> in{
        c.examples,     c.groups,    c.streams,      c.pieces<T>(), dy.data(),
        x.data(),       mean.data(), inverse.data(), scale.data(),  dx.data(),
        sums.data(),    parts.data(), vectors.data()};
    normjax::run(in, shared_pool(threads));
    CHECK(dx.intact() && sums.intact() && parts.intact() && vectors.intact(), c.name());
  }

  bool same_results(const Arrays& other) const {
    return dx.same_bits(other.dx) && sums.same_bits(other.sums);
  }
};

// The sums of dy and of dy (x - mean), and of their magnitudes.
struct Sums {
  Real dy = 0, products = 0, dy_magnitude = 0, product_magnitude = 0;

  void add(const Sums& other, Real factor) {
    dy += factor * other.dy;
    products += factor * other.products;
    dy_magnitude += std::abs(factor) * other.dy_magnitude;
    product_magnitude += std::abs(factor) * other.product_magnitude;
  }
};

// A feature of an example: the parameters of its normalization, and its sums.
struct Feature {
  Real mean, inverse, scale;
  Sums sums, group_means;  // The means are of g = dy scale, over all entries of the group.
};

template <class T>
std::vector<Feature> features_of(const Case& c, const Arrays<T>& a, Index example) {
  std::vector<Feature> features(c.features);
  for (Index k = 0; k < c.features; ++k) {
    const Index group = example * c.groups + k / c.size();
    features[k].mean = a.mean[group];
    features[k].inverse = a.inverse[group];
    features[k].scale = c.scale ? a.scale[k] : 1;
  }
  for (Index r = 0; r < c.rows; ++r) {
    const Index i = example * c.entries() + r * c.features;
    for (Index k = 0; k < c.features; ++k) {
      const Real dy = real(a.dy[i + k]), product = dy * (real(a.x[i + k]) - features[k].mean);
      features[k].sums.add({dy, product, std::abs(dy), std::abs(product)}, 1);
    }
  }
  return features;
}

void add_group_means(const Case& c, std::vector<Feature>& features) {
  std::vector<Sums> groups(c.groups);
  for (Index k = 0; k < c.features; ++k) {
    groups[k / c.size()].add(features[k].sums, features[k].scale / c.count());
  }
  for (Index k = 0; k < c.features; ++k) features[k].group_means = groups[k / c.size()];
}

template <class T>
void check_sums(const Case& c, const std::vector<Feature>& features, const Arrays<T>& a,
                Index example) {
  using A = Accumulator<T>;
  for (Index k = 0; k < c.features; ++k) {
    const Sums& sums = features[k].sums;
    const A dy = a.sums[example * 2 * c.features + k];
    const A products = a.sums[(example * 2 + 1) * c.features + k];
    CHECK(std::abs(dy - sums.dy) <= sum_tolerance<A>(c.rows, sums.dy_magnitude), c.name(),
          "example", example, "feature", k, "expected", sums.dy, "found", dy);
    CHECK(std::abs(products - sums.products) <= sum_tolerance<A>(c.rows, sums.product_magnitude),
          c.name(), "example", example, "feature", k, "expected", sums.products, "found", products);
  }
}

template <class T>
void check_dx(const Case& c, const std::vector<Feature>& features, const Arrays<T>& a,
              Index example) {
  for (Index r = 0; r < c.rows; ++r) {
    for (Index k = 0; k < c.features; ++k) {
      const Feature& f = features[k];
      const Sums& means = f.group_means;
      const Index i = example * c.entries() + r * c.features + k;
      const Real g = real(a.dy[i]) * f.scale, d = real(a.x[i]) - f.mean;
      const Real slope = d * f.inverse * f.inverse;
      const Real expected = f.inverse * (g - means.dy - slope * means.products);
      const Real magnitude =
          std::abs(g) + means.dy_magnitude + std::abs(slope) * means.product_magnitude;
      const Real found = real(a.dx[i]);
      const Real allowed = dx_tolerance<T>(f.inverse, d, magnitude, expected);
      CHECK(std::abs(found - expected) <= allowed, c.name(), "example", example, "row", r,
            "feature", k, "expected", expected, "found", found, "allowed", allowed);
    }
  }
}

template <class T>
void check_results(const Case& c, const Arrays<T>& a) {
  for (Index e = 0; e < c.examples; ++e) {
    std::vector<Feature> features = features_of(c, a, e);
    add_group_means(c, features);
    check_sums(c, features, a, e);
    if (c.propagates) check_dx(c, features, a, e);
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
      c.propagates = bits & 2;
      check_case<T>(c);
    }
  }
}

// Without dx, the sums stay the same.
template <class T>
void test_sums_only() {
  for_each_case(bitwise_sizes<T>(), [](Case c) {
    Arrays<T> whole(c);
    whole.run(c);
    c.propagates = false;
    Arrays<T> sums(c);
    sums.run(c);
    CHECK(sums.sums.same_bits(whole.sums), c.name());
  });
}

template <class T>
void test_no_examples() {
  const Case c{0, 5, 3, 1, 2};
  Arrays<T> a(c);
  a.run(c);
}

template <class T>
void test_large_mean() {
  for (Index features : {1, 3, 64, 257, 1025}) {
    for (Index groups : {Index{1}, features}) {
      Case c{2, 97, features, groups, 4};
      c.mean = 1e4;
      check_case<T>(c);
    }
  }
}

// If entry `place` of the second example of x or dy is not finite, only dx of its group and the
// sums of its column are not finite.
template <class T>
void check_not_finite(const Case& c, Index place, double value, bool in_x) {
  const Index feature = place % c.features, group = c.groups + feature / c.size();
  Arrays<T> clean(c), a(c);
  clean.run(c);
  (in_x ? a.x : a.dy)[c.entries() + place] = nearest<T>(value);
  a.run(c);
  for (Index i = 0; i < a.sums.size(); ++i) {
    const Index of_dy = 2 * c.features + feature, of_products = 3 * c.features + feature;
    const bool own = i == of_products || (i == of_dy && !in_x);
    CHECK(own ? !std::isfinite(a.sums[i]) : a.sums.same_bits(clean.sums, i, i + 1), c.name(), "sum",
          i, "found", a.sums[i]);
  }
  for (Index i = 0; i < a.dx.size(); ++i) {
    const bool own = i / c.entries() * c.groups + i % c.features / c.size() == group;
    CHECK(own ? !std::isfinite(real(a.dx[i])) : a.dx.same_bits(clean.dx, i, i + 1), c.name(), "i",
          i, "found", real(a.dx[i]));
  }
}

template <class T>
void test_not_finite() {
  for (double value : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    for (Case c : {Case{3, 29, 6, 3, 4}, Case{3, 29, 13, 13, 2}, Case{2, 29, 257, 257, 3},
                   Case{2, 7, 1030, 103, 2}}) {
      for (bool in_x : {false, true}) {
        check_not_finite<T>(c, 0, value, in_x);
        check_not_finite<T>(c, c.entries() - 1, value, in_x);
      }
    }
  }
}

// Standard deviations of 1e13 and 1e-13: the third power of the inverse is out of range in float.
template <class T>
void test_extreme_scales() {
  for (double deviation : {1e13, 1e-13}) {
    if (std::is_same_v<T, Float16>) continue;
    for (Case c : {Case{2, 29, 6, 3, 4}, Case{2, 29, 257, 257, 3}, Case{1, 300, 5, 5, 2}}) {
      c.deviation = deviation;
      c.epsilon = 0;
      check_case<T>(c);
    }
  }
}

template <class T>
void test_denormals() {
  for (Case c : {Case{2, 29, 6, 3, 4}, Case{2, 29, 257, 257, 3}, Case{1, 300, 5, 5, 2}}) {
    Arrays<T> a(c);
    fill_with_denormals(a.dy, c.rows);
    a.run(c);
    check_results(c, a);
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

void test_columns_backward(Suite& suite) {
  for_each_dtype([&](auto type) {
    using T = decltype(type);
    const std::string name = std::string("columns backward: ") + Dtype<T>::name;
    suite.test(name + ", sizes", test_sizes<T>);
    suite.test(name + ", sizes beyond a cache", test_large_sizes<T>);
    suite.test(name + ", options", test_options<T>);
    suite.test(name + ", sums only", test_sums_only<T>);
    suite.test(name + ", no examples", test_no_examples<T>);
    suite.test(name + ", mean 1e4", test_large_mean<T>);
    suite.test(name + ", not finite", test_not_finite<T>);
    suite.test(name + ", extreme scales", test_extreme_scales<T>);
    suite.test(name + ", denormals", test_denormals<T>);
    suite.test(name + ", streams and offsets", test_streams_and_offsets<T>);
    suite.test(name + ", threads", test_threads<T>);
  });
}

}  // namespace normjax::test
