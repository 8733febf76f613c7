// How far results may be from the formulas in long double.
//
// eps is that of the dtype of accumulation, and a rounding is at most eps / 2.
//
// A sum in the lanes of a vector goes through at most 512 additions, one after the other, before it
// goes on in double. Their roundings are as good as independent: together sqrt(512) eps / 2, 12 eps
// of the sum of magnitudes. A dozen of other roundings, which are as independent, is less than the
// 4 eps that remain to kRoundings.

#ifndef NORMJAX_TESTS_ORACLE_H_
#define NORMJAX_TESTS_ORACLE_H_

#include <cmath>
#include <limits>

#include "formats.h"

namespace normjax::test {

template <class A>
constexpr Real kEps = std::numeric_limits<A>::epsilon();

// Half of it is lost where a number is rounded that is not normal.
template <class A>
constexpr Real kLeast = std::numeric_limits<A>::denorm_min();

constexpr Real kRoundings = 16;

// What one more rounding to T may do to y: half the distance of its neighbors.
template <class T>
Real half_unit(Real y) {
  constexpr Real relative = power_of_two(-Dtype<T>::digits);
  constexpr Real least = power_of_two(Dtype<T>::least - 1);
  return relative * std::abs(y) + least;
}

// A sum over so many rows in the dtype of accumulation, against the sum of magnitudes.
template <class A>
Real sum_tolerance(Index rows, Real magnitudes) {
  return kEps<A> * (8 + std::sqrt(static_cast<Real>(rows))) * magnitudes + rows * kLeast<A>;
}

struct Moments {
  Real mean = 0, m2 = 0;
};

// A mean is rounded to eps / 2 of itself, once or for each block of rows; the sum of deviations,
// from which it is corrected, has kRoundings eps of their magnitude.
template <class A>
Real mean_tolerance(const Moments& moments, Real count) {
  const Real deviation = std::sqrt(moments.m2 / count);
  return kEps<A> * (std::abs(moments.mean) + kRoundings * deviation) + kLeast<A>;
}

// Squares are summed around a center, and the rounding of that is corrected. Only means of blocks
// that were rounded for themselves, by eps / 2 |mean| as above, are not where they should be when
// they are merged: each square 2 (m - mean) n of a block is off by that.
template <class A>
Real m2_tolerance(const Moments& moments, Real count, bool merged) {
  const Real shift = merged ? std::abs(moments.mean) * std::sqrt(moments.m2 * count) : 0;
  const Real second = kEps<A> * moments.mean * kEps<A> * moments.mean * count;
  return kEps<A> * (kRoundings * moments.m2 + shift) + second + count * kLeast<A>;
}

// y = (x - mean) inverse scale + bias, where mean may be off by eps |mean| and inverse by
// kRoundings eps / 2, and each step rounds.
template <class T>
Real y_tolerance(Real mean, Real inverse, Real normalized, Real scale, Real bias, Real y) {
  using A = Accumulator<T>;
  const Real of_mean = 1 + std::abs(mean) * inverse;
  const Real product = of_mean * std::max<Real>(1, std::abs(normalized)) * std::abs(scale);
  const Real least = kLeast<A> * ((inverse + 1) * std::abs(scale) + 1);
  return kEps<A> * (kRoundings * product + std::abs(bias)) + least + half_unit<T>(y);
}

// dx = inverse (g - mean of g - d inverse^2 mean of g d), each term with the error of its sums;
// `magnitude` is what is in parentheses with the magnitudes of all it is made of.
template <class T>
Real dx_tolerance(Real inverse, Real d, Real magnitude, Real dx) {
  using A = Accumulator<T>;
  // Where means are not normal, they are multiplied by up to three inverses and by d.
  const Real inverses = (1 + inverse) * (1 + inverse) * (1 + inverse);
  const Real least = kLeast<A> * inverses * (1 + std::abs(d));
  return kEps<A> * kRoundings * inverse * magnitude + least + half_unit<T>(dx);
}

}  // namespace normjax::test

#endif  // NORMJAX_TESTS_ORACLE_H_
