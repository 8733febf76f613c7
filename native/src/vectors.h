// Vectors in the dtype of accumulation, with loads from and stores to every dtype.
//
// They use the vector extensions of GCC and Clang. A vector is one register of AVX-512 or AVX2, or
// two of SSE or NEON. GCC compiles longer vectors to slow code.

#ifndef NORMJAX_VECTORS_H_
#define NORMJAX_VECTORS_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __SSE2__
#include <emmintrin.h>
#define NORMJAX_STREAMS
#endif

namespace normjax {

#define NORMJAX_INLINE inline __attribute__((always_inline))
#define NORMJAX_INLINE_LAMBDA __attribute__((always_inline))

// Vectors are never passed to a function that is not inlined, so their ABI does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

using Index = std::ptrdiff_t;

#ifdef __AVX512F__
constexpr Index kVectorBytes = 64;
#else
constexpr Index kVectorBytes = 32;
#endif

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

// Statistics of half precision are accumulated in float.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A, Index Bytes>
struct VectorOf {
  typedef A type __attribute__((vector_size(Bytes)));
};

template <class A, Index Bytes = kVectorBytes>
using Vector = typename VectorOf<A, Bytes>::type;

template <class A>
constexpr Index kLanes = kVectorBytes / sizeof(A);

typedef std::uint16_t Words __attribute__((vector_size(kVectorBytes / 2)));
typedef std::uint32_t Bits __attribute__((vector_size(kVectorBytes)));

template <class To, class From>
NORMJAX_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

NORMJAX_INLINE Vector<double> widened(const Vector<double>& v, double) { return v; }

NORMJAX_INLINE Vector<float> widened(const Vector<float>& v, float) { return v; }

// The loop is over an array: GCC 12 makes code from it that is twice as fast as for a vector.
NORMJAX_INLINE Bits widened_bits(const Words& v) {
  std::uint16_t words[kLanes<float>];
  std::uint32_t bits[kLanes<float>];
  std::memcpy(words, &v, sizeof(words));
  for (Index i = 0; i < kLanes<float>; ++i) bits[i] = words[i];
  return bit_cast<Bits>(bits);
}

NORMJAX_INLINE Vector<float> widened(const Words& v, BFloat16) {
  return bit_cast<Vector<float>>(widened_bits(v) << 16);
}

NORMJAX_INLINE Vector<float> widened(const Words& v, Float16) {
  const Bits half = widened_bits(v), magnitude = half & 0x7fff;
  // The exponent bias of float is larger by 112. In both, infinity and NaN have the largest
  // exponent.
  Bits normal = (magnitude << 13) + (112u << 23);
  normal += (magnitude >= 0x7c00) ? Bits{} + (112u << 23) : Bits{};
  // A denormal half is an integer times 2^-24. This computation has no denormal float, which would
  // become zero on a processor that flushes denormals.
  typedef std::int32_t Signed __attribute__((vector_size(kVectorBytes)));
  const Vector<float> small =
      __builtin_convertvector(bit_cast<Signed>(magnitude), Vector<float>) * 0x1p-24f;
  const Bits value = (magnitude < 0x0400) ? bit_cast<Bits>(small) : normal;
  return bit_cast<Vector<float>>(value | ((half & 0x8000) << 16));
}

NORMJAX_INLINE Vector<double> narrowed(const Vector<double>& v, double) { return v; }

NORMJAX_INLINE Vector<float> narrowed(const Vector<float>& v, float) { return v; }

// Rounds to nearest, ties to even.
NORMJAX_INLINE Words narrowed(const Vector<float>& v, BFloat16) {
  const Bits bits = bit_cast<Bits>(v);
  const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1), quiet_nan = bits | 0x400000;
  return __builtin_convertvector(((v != v) ? quiet_nan : rounded) >> 16, Words);
}

NORMJAX_INLINE Words narrowed(const Vector<float>& v, Float16) {
  const Bits bits = bit_cast<Bits>(v), magnitude = bits & 0x7fffffff;
  // At least 2^-14: rebias the exponent and round off 13 bits. If rounding exceeds the largest
  // number, the carry makes it infinity. Larger floats become infinity too.
  Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  normal = (magnitude >= 0x47800000) ? Bits{} + 0x7c00 : normal;
  // Below 2^-14: add 0.5, where the last bit of a float is 2^-24, so the addition rounds.
  const Vector<float> shifted = bit_cast<Vector<float>>(magnitude) + 0.5f;
  const Bits small = bit_cast<Bits>(shifted) - 0x3f000000;
  Bits value = (magnitude < 0x38800000) ? small : normal;
  value = (magnitude > 0x7f800000) ? Bits{} + 0x7e00 : value;
  return __builtin_convertvector(value | ((bits >> 16) & 0x8000), Words);
}

// Prefetches `Bytes` bytes.
template <Index Bytes>
NORMJAX_INLINE void prefetch(const void* from) {
  constexpr Index kLine = 64;
  for (Index i = 0; i < Bytes; i += kLine) {
    __builtin_prefetch(static_cast<const char*>(from) + i);
  }
}

// Which lanes of a vector are to be used.

// All of them.
struct Full {};

// All but the first ones: the vector ends with the array, and those were in the vector before.
struct Tail {
  int skipped;
};

// Only the first ones, which exist: the array is shorter than a vector.
struct Partial {
  int lanes;
};

// The lanes that exist.
NORMJAX_INLINE Full existing(Full) { return {}; }
NORMJAX_INLINE Full existing(Tail) { return {}; }
NORMJAX_INLINE Partial existing(Partial part) { return part; }

template <class T>
using Stored = std::conditional_t<sizeof(T) == 2, Words, Vector<Accumulator<T>>>;

template <class T>
NORMJAX_INLINE Vector<Accumulator<T>> load(const T* from, Full, Accumulator<T> = 0) {
  Stored<T> stored;
  std::memcpy(&stored, from, sizeof(stored));
  return widened(stored, T{});
}

// 0, 1, .. in integers of the size of A.
template <class A>
NORMJAX_INLINE auto lane_numbers() {
  Vector<std::conditional_t<sizeof(A) == 4, std::int32_t, std::int64_t>> lane;
  for (Index i = 0; i < kLanes<A>; ++i) lane[i] = i;
  return lane;
}

// The other lanes are set to `rest`.
template <class T>
NORMJAX_INLINE Vector<Accumulator<T>> load(const T* from, Tail part, Accumulator<T> rest = 0) {
  using A = Accumulator<T>;
  return lane_numbers<A>() < part.skipped ? Vector<A>{} + rest : load(from, Full{});
}

template <class T>
NORMJAX_INLINE Vector<Accumulator<T>> load(const T* from, Partial part, Accumulator<T> rest = 0) {
  using A = Accumulator<T>;
  Stored<T> stored{};
  std::memcpy(&stored, from, part.lanes * sizeof(T));
  return lane_numbers<A>() < part.lanes ? widened(stored, T{}) : Vector<A>{} + rest;
}

template <class T>
NORMJAX_INLINE void store(T* to, const Vector<Accumulator<T>>& v, Full) {
  const Stored<T> stored = narrowed(v, T{});
  std::memcpy(to, &stored, sizeof(stored));
}

template <class T>
NORMJAX_INLINE void store(T* to, const Vector<Accumulator<T>>& v, Partial part) {
  const Stored<T> stored = narrowed(v, T{});
  std::memcpy(to, &stored, part.lanes * sizeof(T));
}

// Stores past the cache, for results that are not read again soon: a normal store first reads the
// cache line from memory.
template <class T>
NORMJAX_INLINE void stream(T* to, const Vector<Accumulator<T>>& v, Full) {
#ifdef NORMJAX_STREAMS
  const Stored<T> stored = narrowed(v, T{});
  __m128i parts[sizeof(stored) / sizeof(__m128i)];
  std::memcpy(parts, &stored, sizeof(stored));
  for (std::size_t i = 0; i < sizeof(stored) / sizeof(__m128i); ++i) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, parts[i]);
  }
#else
  store(to, v, Full{});
#endif
}

template <class T>
NORMJAX_INLINE void stream(T* to, const Vector<Accumulator<T>>& v, Partial part) {
  store(to, v, part);
}

// Whether rows of `bytes` bytes may be streamed: whole cache lines. Others take 15 times as long.
NORMJAX_INLINE bool can_stream(const void* to, std::size_t bytes) {
  constexpr std::size_t kLine = 64;
  return reinterpret_cast<std::uintptr_t>(to) % kLine == 0 && bytes % kLine == 0;
}

// Call it after streaming stores, before another thread reads the results.
NORMJAX_INLINE void finish_streams() {
#ifdef NORMJAX_STREAMS
  _mm_sfence();
#endif
}

struct Store {
  template <class... Arguments>
  NORMJAX_INLINE void operator()(const Arguments&... arguments) const {
    store(arguments...);
  }
};

struct Stream {
  template <class... Arguments>
  NORMJAX_INLINE void operator()(const Arguments&... arguments) const {
    stream(arguments...);
  }
};

// Calls step(i, lanes) at the end of n entries, of which those before i are done.
template <class A, class Step>
NORMJAX_INLINE void last_vector(Index n, Index i, Step step) {
  if (i == n) return;
  if (n < kLanes<A>) {
    step(i, Partial{static_cast<int>(n - i)});
  } else {
    step(n - kLanes<A>, Tail{static_cast<int>(i + kLanes<A> - n)});
  }
}

// Calls step(i, lanes) for each vector of n entries.
template <class A, class Step>
NORMJAX_INLINE void for_each_vector(Index n, Step step) {
  Index i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) step(i, Full{});
  last_vector<A>(n, i, step);
}

// The same for a step that may be called twice for an entry, since it only computes a result.
template <class A, class Step>
NORMJAX_INLINE void map_vectors(Index n, Step step) {
  for_each_vector<A>(n, [&](Index i, auto part) NORMJAX_INLINE_LAMBDA { step(i, existing(part)); });
}

template <class A, class Step, int... Slot>
NORMJAX_INLINE void in_turns(Index i, Step& step, std::integer_sequence<int, Slot...>) {
  (step(i + Slot * kLanes<A>, Full{}, std::integral_constant<int, Slot>{}), ...);
}

// Calls step(i, lanes, slot) with the slots 0 to Slots - 1 in turn, for independent sums.
template <class A, int Slots, class Step>
NORMJAX_INLINE void for_each_vector_in_turns(Index n, Step step) {
  constexpr Index kWidth = kLanes<A>;
  Index i = 0;
  for (; i + Slots * kWidth <= n; i += Slots * kWidth) {
    in_turns<A>(i, step, std::make_integer_sequence<int, Slots>{});
  }
  constexpr std::integral_constant<int, 0> kFirst{};
  for (; i + kWidth <= n; i += kWidth) step(i, Full{}, kFirst);
  last_vector<A>(n, i, [&](Index i, auto part) NORMJAX_INLINE_LAMBDA { step(i, part, kFirst); });
}

// The sum of all lanes.
template <class A, Index Bytes = kVectorBytes>
NORMJAX_INLINE A total(const Vector<A, Bytes>& v) {
  if constexpr (Bytes == 2 * sizeof(A)) {
    return v[0] + v[1];
  } else {
    Vector<A, Bytes / 2> halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return total<A, Bytes / 2>(halves[0] + halves[1]);
  }
}

template <class A, std::size_t Slots>
NORMJAX_INLINE A total_of_slots(const Vector<A> (&slots)[Slots]) {
  if constexpr (Slots == 1) return total<A>(slots[0]);
  return total<A>((slots[0] + slots[1]) + (slots[2] + slots[3]));
}

}  // namespace normjax

#endif  // NORMJAX_VECTORS_H_
