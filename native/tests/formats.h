// Reference conversions of the dtypes, written from their definition and not from the kernels.

#ifndef NORMJAX_TESTS_FORMATS_H_
#define NORMJAX_TESTS_FORMATS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"

namespace normjax::test {

using Real = long double;

// A 16-bit floating-point format: sign, exponent and fraction.
struct Format {
  int exponent_bits, fraction_bits;

  constexpr int largest_exponent() const { return (1 << exponent_bits) - 1; }
  constexpr int infinity() const { return largest_exponent() << fraction_bits; }
  // The least positive number is 2 to this power.
  constexpr int least() const { return 2 - (1 << (exponent_bits - 1)) - fraction_bits; }
};

constexpr Format kBFloat16{8, 7}, kFloat16{5, 10};

inline double decode(std::uint16_t bits, Format format) {
  const int exponent = (bits >> format.fraction_bits) & format.largest_exponent();
  const int fraction = bits & ((1 << format.fraction_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == format.largest_exponent()) {
    const double special = fraction == 0 ? std::numeric_limits<double>::infinity()
                                         : std::numeric_limits<double>::quiet_NaN();
    return std::copysign(special, sign);
  }
  if (exponent == 0) return sign * std::ldexp(fraction, format.least());
  return sign * std::ldexp(fraction + (1 << format.fraction_bits), exponent - 1 + format.least());
}

// value / 2^shift, rounded to nearest, ties to even.
inline std::uint32_t divided(std::uint32_t value, int shift) {
  if (shift > 31) return 0;
  const std::uint32_t whole = value >> shift, rest = value - (whole << shift);
  const std::uint32_t half = std::uint32_t{1} << (shift - 1);
  return whole + (rest > half || (rest == half && whole % 2 == 1));
}

// Rounds a float to nearest, ties to even, and returns the bits. For NaN the fraction is 1.
inline std::uint16_t encode(std::uint32_t bits, Format format) {
  const std::uint32_t sign = (bits >> 16) & 0x8000, fraction = bits & 0x7fffff;
  const int exponent = (bits >> 23) & 0xff;
  if (exponent == 0xff) return sign | format.infinity() | (fraction != 0);
  // The float is significand * 2^power, and the result is a multiple of 2^unit.
  const std::uint32_t significand = exponent == 0 ? fraction : fraction | 0x800000;
  if (significand == 0) return sign;
  const int power = std::max(exponent, 1) - 150;
  const int length = 32 - __builtin_clz(significand);
  const int unit = std::max(power + length - 1 - format.fraction_bits, format.least());
  const std::uint32_t multiple = unit > power ? divided(significand, unit - power)
                                              : significand << (power - unit);
  // The leading bit of a normal number adds 1 to its exponent field.
  const std::int64_t all =
      (std::int64_t{unit - format.least()} << format.fraction_bits) + multiple;
  return sign | static_cast<std::uint16_t>(std::min<std::int64_t>(all, format.infinity()));
}

constexpr Real power_of_two(int exponent) {
  Real power = 1;
  for (; exponent > 0; --exponent) power *= 2;
  for (; exponent < 0; ++exponent) power /= 2;
  return power;
}

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// A dtype: its number of significant bits, and the exponent of its least positive number.
template <class T>
struct Dtype {
  static constexpr int digits = std::numeric_limits<T>::digits;
  static constexpr int least = std::numeric_limits<T>::min_exponent - digits;
  static constexpr const char* name = sizeof(T) == 4 ? "float" : "double";
  static Real real(T value) { return value; }
  static T nearest(double value) { return static_cast<T>(value); }
};

inline std::vector<float> decode_all(Format format) {
  std::vector<float> all(65536);
  for (int i = 0; i < 65536; ++i) all[i] = static_cast<float>(decode(i, format));
  return all;
}

template <class T>
struct HalfDtype {
  static Real real(T value) { return values[value.bits]; }
  // Through float, since the kernels store from float.
  static T nearest(double value) {
    return T{encode(bits_of(static_cast<float>(value)), Dtype<T>::format)};
  }
  static const std::vector<float> values;
};

template <>
struct Dtype<BFloat16> : HalfDtype<BFloat16> {
  static constexpr Format format = kBFloat16;
  static constexpr int digits = format.fraction_bits + 1;
  static constexpr int least = format.least();
  static constexpr const char* name = "BFloat16";
};

template <>
struct Dtype<Float16> : HalfDtype<Float16> {
  static constexpr Format format = kFloat16;
  static constexpr int digits = format.fraction_bits + 1;
  static constexpr int least = format.least();
  static constexpr const char* name = "Float16";
};

template <class T>
const std::vector<float> HalfDtype<T>::values = decode_all(Dtype<T>::format);

template <class T>
Real real(T value) {
  return Dtype<T>::real(value);
}

template <class T>
T nearest(double value) {
  return Dtype<T>::nearest(value);
}

// Calls call(T{}) for every dtype.
template <class Call>
void for_each_dtype(Call call) {
  call(float{});
  call(double{});
  call(BFloat16{});
  call(Float16{});
}

}  // namespace normjax::test

#endif  // NORMJAX_TESTS_FORMATS_H_
