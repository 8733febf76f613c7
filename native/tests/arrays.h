// Arrays that detect writes out of bounds, and random numbers to fill them.

#ifndef NORMJAX_TESTS_ARRAYS_H_
#define NORMJAX_TESTS_ARRAYS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "formats.h"

namespace normjax::test {

// n entries that start `shift` entries after a multiple of 64 bytes. They are initially NaN.
template <class T>
class Array {
 public:
  Array(Index n, Index shift, Index behind)
      : n_(n), behind_(behind), start_(kGuard + shift * Index{sizeof(T)}) {
    const Index bytes = n_ * sizeof(T);
    const auto align = std::align_val_t{64};
    memory_.reset(static_cast<unsigned char*>(::operator new(start_ + bytes + behind_, align)));
    std::memset(memory_.get(), kMark, start_ + bytes + behind_);
    std::memset(memory_.get() + start_, 0xff, bytes);
  }

  // Null if there are no entries, as the kernels receive it.
  T* data() const { return n_ == 0 ? nullptr : reinterpret_cast<T*>(memory_.get() + start_); }
  Index size() const { return n_; }
  T& operator[](Index i) { return data()[i]; }
  const T& operator[](Index i) const { return data()[i]; }

  // Whether no byte outside the entries was written.
  bool intact() const {
    const unsigned char *from = memory_.get(), *end = from + start_ + n_ * sizeof(T);
    const auto marked = [](unsigned char byte) { return byte == kMark; };
    return std::all_of(from, from + start_, marked) && std::all_of(end, end + behind_, marked);
  }

  bool same_bits(const Array& other) const {
    return n_ == other.n_ && (n_ == 0 || same_bits(other, 0, n_));
  }

  bool same_bits(const Array& other, Index begin, Index end) const {
    return std::memcmp(data() + begin, other.data() + begin, (end - begin) * sizeof(T)) == 0;
  }

 protected:
  static constexpr Index kGuard = 128;

 private:
  static constexpr unsigned char kMark = 0xa5;

  struct Free {
    void operator()(unsigned char* memory) const {
      ::operator delete(memory, std::align_val_t{64});
    }
  };

  Index n_, behind_, start_;
  std::unique_ptr<unsigned char, Free> memory_;
};

// Without a guard after the entries, so that the address sanitizer finds reads past the end.
template <class T>
struct Input : Array<T> {
  Input(Index n, Index shift) : Array<T>(n, shift, 0) {}
};

template <class T>
struct Output : Array<T> {
  Output(Index n, Index shift) : Array<T>(n, shift, Array<T>::kGuard) {}
};

// The generator splitmix64 of Steele, Lea, Flood (2014).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  Index below(Index n) { return static_cast<Index>(bits() % static_cast<std::uint64_t>(n)); }

  bool coin() { return bits() >> 63 != 0; }

  // A number of mean 0 and standard deviation 1: the scaled sum of four uniform 16-bit numbers.
  double number() {
    const std::uint64_t word = bits();
    const auto sum = (word & 0xffff) + (word >> 16 & 0xffff) + (word >> 32 & 0xffff) + (word >> 48);
    constexpr double kDeviation = 37837.22723;  // 65536 / sqrt(3)
    return (static_cast<double>(sum) - 2 * 65535) / kDeviation;
  }

 private:
  std::uint64_t state_;
};

template <class T>
void fill(Array<T>& to, std::uint64_t seed, double mean, double deviation) {
  if (deviation == 0) {
    std::fill_n(to.data(), to.size(), nearest<T>(mean));
    return;
  }
  Random random(seed);
  for (Index i = 0; i < to.size(); ++i) to[i] = nearest<T>(mean + deviation * random.number());
}

// Fills with integers from -64 to 64, times the least positive number of T.
template <class T>
void fill_with_denormals(Array<T>& to, std::uint64_t seed) {
  constexpr double kLeast = power_of_two(Dtype<T>::least);
  Random random(seed);
  for (Index i = 0; i < to.size(); ++i) to[i] = nearest<T>((random.below(129) - 64) * kLeast);
}

}  // namespace normjax::test

#endif  // NORMJAX_TESTS_ARRAYS_H_
