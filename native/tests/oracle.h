// Tolerances: how far results may be from the formulas in long double.
//
// eps is that of the dtype of accumulation, and a rounding error is at most eps / 2, relatively.
//
// A lane of a vector sums at most 512 terms in sequence before the sum continues in double. If the
// rounding errors are independent, their total is about sqrt(512) eps / 2, less than 12 eps, times
// the sum of magnitudes. A dozen other rounding errors are less than the remaining 4 eps of
// kRoundings.

#ifndef NORMJAX_TESTS_ORACLE_H_
#define NORMJAX_TESTS_ORACLE_H_

#include <cmath>
#include <limits>

#include "formats.h"

namespace normjax::test {

template <class A>
constexpr Real kEps = std::numeric_limits<A>::epsilon();

// The rounding error of a denormal result is up to half of this.
template <class A>
constexpr Real kLeast = std::numeric_limits<A>::denorm_min();

constexpr Real kRoundings = 16;

// The rounding error of y in T: half the distance between adjacent numbers.
template <class T>
Real half_unit(Real y) {
  constexpr Real relative = power_of_two(-Dtype<T>::digits);
  constexpr Real least = power_of_two(Dtype<T>::least - 1);
  return relative * std::abs(y) + least;
}

// For a sum over rows in the dtype of accumulation, relative to the sum of magnitudes.
template <class A>
Real sum_tolerance(Index rows, Real magnitudes) {
  return kEps<A> * (8 + std::sqrt(static_cast<Real>(rows))) * magnitudes + rows * kLeast<A>;
}

struct Moments {
  Real mean = 0, m2 = 0;
};

// A mean is rounded by eps / 2 |mean|, once or for each block of rows. The sum of deviations that
// corrects it has an error of kRoundings eps times their magnitude.
template <class A>
Real mean_tolerance(const Moments& moments, Real count) {
  const Real deviation = std::sqrt(moments.m2 / count);
  return kEps<A> * (std::abs(moments.mean) + kRoundings * deviation) + kLeast<A>;
}

// Squares are summed around a center, and its rounding error is corrected. If blocks are merged,
// the rounding errors of their means, eps / 2 |mean| as above, remain: the term n (m - mean)^2 of a
// block is off by 2 n (m - mean) times that error.
template <class A>
Real m2_tolerance(const Moments& moments, Real count, bool merged) {
  const Real shift = merged ? std::abs(moments.mean) * std::sqrt(moments.m2 * count) : 0;
  const Real second = kEps<A> * moments.mean * kEps<A> * moments.mean * count;
  return kEps<A> * (kRoundings * moments.m2 + shift) + second + count * kLeast<A>;
}

// For y = (x - mean) inverse scale + bias. The mean may be off by eps |mean|, inverse by
// kRoundings eps / 2, and each operation rounds.
template <class T>
Real y_tolerance(Real mean, Real inverse, Real normalized, Real scale, Real bias, Real y) {
  using A = Accumulator<T>;
  const Real of_mean = 1 + std::abs(mean) * inverse;
  const Real product = of_mean * std::max<Real>(1, std::abs(normalized)) * std::abs(scale);
  const Real least = kLeast<A> * ((inverse + 1) * std::abs(scale) + 1);
  return kEps<A> * (kRoundings * product + std::abs(bias)) + least + half_unit<T>(y);
}

// For dx = inverse (g - mean(g) - inverse^2 d mean(g d)). Each term has the error of its sums.
// `magnitude` is the value in parentheses computed with the magnitudes of all terms.
template <class T>
Real dx_tolerance(Real inverse, Real d, Real magnitude, Real dx) {
  using A = Accumulator<T>;
  // The error of a denormal mean is multiplied by up to three inverses and by d.
  const Real inverses = (1 + inverse) * (1 + inverse) * (1 + inverse);
  const Real least = kLeast<A> * inverses * (1 + std::abs(d));
  return kEps<A> * kRoundings * inverse * magnitude + least + half_unit<T>(dx);
}

}  // namespace normjax::test

#endif  // NORMJAX_TESTS_ORACLE_H_
