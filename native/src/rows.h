// Norms over rows: x has shape (rows, n), and each row has its own statistics, as in layer norm.
//
// A row is read from memory once. Its mean, the squares around that mean, and y are computed while
// it is in the cache. Several short rows are processed together, since their sums are independent
// and the latency of additions overlaps.

#ifndef NORMJAX_ROWS_H_
#define NORMJAX_ROWS_H_

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "vectors.h"

namespace normjax {

// The number of entries that are summed in the dtype of accumulation before their sum is added in
// double. So the rounding error does not grow with the length of a row.
constexpr Index kPiece = 2048;

// The number of independent sums in a loop: of several rows, or of parts of one row.
constexpr int kSideBySide = 4;

// Longer rows are processed one by one: four rows and their results do not fit into the L1 cache.
constexpr Index kShort = 1024;

template <class T>
struct RowsForward {
  using A = Accumulator<T>;
  Index rows, n;
  bool centered, streams;
  A divisor, epsilon;
  const T* x;
  const A *scale, *bias;  // (n), or null
  T* y;
  A *mean, *m2;
};

template <class T, int Rows>
NORMJAX_INLINE void row_sums(const T* x, Index n, double (&sums)[Rows]) {
  using A = Accumulator<T>;
  constexpr int kSlots = kSideBySide / Rows;
  for (int r = 0; r < Rows; ++r) sums[r] = 0;
  for (Index start = 0; start < n; start += kPiece) {
    Vector<A> sum[Rows][kSlots] = {};
    for_each_vector_in_turns<A, kSlots>(
        std::min(kPiece, n - start), [&](Index i, auto part, auto slot) NORMJAX_INLINE_LAMBDA {
          for (int r = 0; r < Rows; ++r) sum[r][slot()] += load(x + r * n + start + i, part);
        });
    for (int r = 0; r < Rows; ++r) sums[r] += total_of_slots<A>(sum[r]);
  }
}

// Computes the sums of x - center and of its square.
template <class T, int Rows>
NORMJAX_INLINE void row_deviations(const T* x, Index n, const Accumulator<T> (&center)[Rows],
                                   double (&first)[Rows], double (&second)[Rows]) {
  using A = Accumulator<T>;
  constexpr int kSlots = kSideBySide / Rows;
  for (int r = 0; r < Rows; ++r) first[r] = second[r] = 0;
  for (Index start = 0; start < n; start += kPiece) {
    Vector<A> sum[Rows][kSlots] = {}, squares[Rows][kSlots] = {};
    for_each_vector_in_turns<A, kSlots>(
        std::min(kPiece, n - start), [&](Index i, auto part, auto slot) NORMJAX_INLINE_LAMBDA {
          for (int r = 0; r < Rows; ++r) {
            const Vector<A> d = load(x + r * n + start + i, part, center[r]) - center[r];
            sum[r][slot()] += d;
            squares[r][slot()] += d * d;
          }
        });
    for (int r = 0; r < Rows; ++r) first[r] += total_of_slots<A>(sum[r]);
    for (int r = 0; r < Rows; ++r) second[r] += total_of_slots<A>(squares[r]);
  }
}

// The corrected two-pass algorithm: Chan, Golub, LeVeque (1983), equation (1.7).
template <class T, int Rows>
NORMJAX_INLINE void row_moments(const T* x, Index n, bool centered, Accumulator<T> (&mean)[Rows],
                                Accumulator<T> (&m2)[Rows]) {
  using A = Accumulator<T>;
  double first[Rows] = {}, second[Rows];
  if (centered) row_sums(x, n, first);
  for (int r = 0; r < Rows; ++r) mean[r] = static_cast<A>(first[r] / n);
  row_deviations(x, n, mean, first, second);
  for (int r = 0; r < Rows; ++r) {
    const double rest = centered ? first[r] / n : 0;
    mean[r] = static_cast<A>(mean[r] + rest);
    // If the sum overflows, m2 is infinite and not the difference of two infinities, NaN.
    m2[r] = static_cast<A>(std::isfinite(second[r]) ? std::max(second[r] - rest * first[r], 0.0)
                                                    : second[r]);
  }
}

template <class T, int Rows>
NORMJAX_INLINE void rows_forward_group(const RowsForward<T>& in, Index row) {
  using A = Accumulator<T>;
  const Index n = in.n;
  const T* x = in.x + row * n;
  T* y = in.y + row * n;
  A mean[Rows], m2[Rows], inverse[Rows];
  row_moments(x, n, in.centered, mean, m2);
  for (int r = 0; r < Rows; ++r) {
    inverse[r] = A{1} / std::sqrt(m2[r] / in.divisor + in.epsilon);
    in.mean[row + r] = mean[r];
    in.m2[row + r] = m2[r];
  }
  const A *scale = in.scale, *bias = in.bias;
  // The same entry of all rows, so that its scale and bias are loaded once.
  const auto normalize = [&](auto put, auto affine) NORMJAX_INLINE_LAMBDA {
    map_vectors<A>(n, [&](Index i, auto part) NORMJAX_INLINE_LAMBDA {
      for (int r = 0; r < Rows; ++r) {
        prefetch<kLanes<A> * sizeof(T)>(x + (Rows + r) * n + i);
        const Vector<A> d = (load(x + r * n + i, part) - mean[r]) * inverse[r];
        put(y + r * n + i, affine(d, i, part), part);
      }
    });
  };
  const auto both = [=](auto d, Index i, auto part) NORMJAX_INLINE_LAMBDA {
    return d * load(scale + i, part) + load(bias + i, part);
  };
  const auto any = [=](auto d, Index i, auto part) NORMJAX_INLINE_LAMBDA {
    if (scale != nullptr) d *= load(scale + i, part);
    if (bias != nullptr) d += load(bias + i, part);
    return d;
  };
  const bool streams = in.streams && can_stream(y, n * sizeof(T));
  if (scale != nullptr && bias != nullptr) {
    streams ? normalize(Stream{}, both) : normalize(Store{}, both);
  } else {
    streams ? normalize(Stream{}, any) : normalize(Store{}, any);
  }
}

template <class T>
void rows_forward(const RowsForward<T> in, Index begin, Index end) {
  for (; begin + kSideBySide <= end && in.n <= kShort; begin += kSideBySide) {
    rows_forward_group<T, kSideBySide>(in, begin);
  }
  for (; begin < end; ++begin) rows_forward_group<T, 1>(in, begin);
  finish_streams();
}

template <class T, class Pool>
void run(const RowsForward<T>& in, Pool& pool) {
  constexpr Index kEntries = 16384;
  const Index groups = std::max<Index>(1, kEntries / (kSideBySide * std::max<Index>(1, in.n)));
  const Index step = groups * kSideBySide;
  parallel_for(pool, (in.rows + step - 1) / step, [&](Index i) {
    rows_forward(in, i * step, std::min(in.rows, (i + 1) * step));
  });
}

// With g = dy scale, d = x - mean and inv = (var + epsilon)^(-1/2), where mean(.) is over a row:
//
//     dx = inv (g - mean(g) - inv^2 d mean(g d))
//     dscale = sum of dy d inv,   dbias = sum of dy   over all rows
template <class T>
struct RowsBackward {
  using A = Accumulator<T>;
  Index rows, n, blocks;
  bool centered, streams;
  A divisor;
  const T *dy, *x;
  const A *mean, *inverse;  // (rows)
  const A* scale;           // (n), or null
  T* dx;
  A *dscale, *dbias;  // (n), or both null
  A* parts;           // (blocks, 2, n): the terms of dscale and dbias, summed over each block
};

template <class T, int Rows>
NORMJAX_INLINE void rows_backward_group(const RowsBackward<T>& in, Index row, Accumulator<T>* dscale,
                                        Accumulator<T>* dbias) {
  using A = Accumulator<T>;
  const Index n = in.n;
  const T *x = in.x + row * n, *dy = in.dy + row * n;
  T* dx = in.dx + row * n;
  const A* scale = in.scale;
  A mean[Rows], inverse[Rows], slope[Rows], shift[Rows];
  double first[Rows] = {}, second[Rows] = {};
  for (int r = 0; r < Rows; ++r) {
    mean[r] = in.mean[row + r];
    inverse[r] = in.inverse[row + r];
  }
  for (Index start = 0; start < n; start += kPiece) {
    Vector<A> sum[Rows] = {}, products[Rows] = {};
    for_each_vector<A>(std::min(kPiece, n - start), [&](Index i, auto part) NORMJAX_INLINE_LAMBDA {
      i += start;
      Vector<A> of_scale{}, of_bias{};
      for (int r = 0; r < Rows; ++r) {
        const Vector<A> t = load(dy + r * n + i, part);
        const Vector<A> d = load(x + r * n + i, part, mean[r]) - mean[r];
        of_scale += t * (d * inverse[r]);
        of_bias += t;
        const Vector<A> g = scale == nullptr ? t : t * load(scale + i, part);
        sum[r] += g;
        products[r] += g * d;
      }
      if (dscale != nullptr) {
        const auto all = existing(part);
        store(dscale + i, load(dscale + i, all) + of_scale, all);
        store(dbias + i, load(dbias + i, all) + of_bias, all);
      }
    });
    for (int r = 0; r < Rows; ++r) first[r] += total<A>(sum[r]);
    for (int r = 0; r < Rows; ++r) second[r] += total<A>(products[r]);
  }
  for (int r = 0; r < Rows; ++r) {
    // Multiply by inv one factor at a time, since inv^3 may overflow or underflow.
    const double inv = inverse[r];
    slope[r] = static_cast<A>(-(inv * (inv * (inv * (second[r] / in.divisor)))));
    shift[r] = in.centered ? static_cast<A>(-inv * (first[r] / n)) : A{0};
  }
  const bool streams = in.streams && can_stream(dx, n * sizeof(T));
  for (int r = 0; r < Rows; ++r) {
    const auto propagate = [&](auto put) NORMJAX_INLINE_LAMBDA {
      map_vectors<A>(n, [&](Index i, auto part) NORMJAX_INLINE_LAMBDA {
        prefetch<kLanes<A> * sizeof(T)>(x + (Rows + r) * n + i);
        prefetch<kLanes<A> * sizeof(T)>(dy + (Rows + r) * n + i);
        Vector<A> g = load(dy + r * n + i, part);
        if (scale != nullptr) g *= load(scale + i, part);
        const Vector<A> d = load(x + r * n + i, part) - mean[r];
        put(dx + r * n + i, g * inverse[r] + (d * slope[r] + shift[r]), part);
      });
    };
    streams ? propagate(Stream{}) : propagate(Store{});
  }
}

template <class T>
void rows_backward(const RowsBackward<T> in, Index block) {
  using A = Accumulator<T>;
  Index begin = in.rows * block / in.blocks;
  const Index end = in.rows * (block + 1) / in.blocks;
  A* dscale = in.dscale == nullptr ? nullptr : in.parts + 2 * block * in.n;
  A* dbias = in.dscale == nullptr ? nullptr : dscale + in.n;
  if (dscale != nullptr) std::fill(dscale, dscale + 2 * in.n, A{0});
  for (; begin + kSideBySide <= end; begin += kSideBySide) {
    rows_backward_group<T, kSideBySide>(in, begin, dscale, dbias);
  }
  for (; begin < end; ++begin) rows_backward_group<T, 1>(in, begin, dscale, dbias);
  finish_streams();
}

// Sums the columns from begin to end of parts over the blocks.
template <class T>
void sum_parts(const RowsBackward<T> in, Index begin, Index end) {
  using A = Accumulator<T>;
  constexpr Index kWidth = 64;
  for (; begin < end; begin += kWidth) {
    const Index width = std::min(kWidth, end - begin);
    double sums[2][kWidth] = {};
    for (Index block = 0; block < in.blocks; ++block) {
      const A* part = in.parts + 2 * block * in.n + begin;
      for (Index i = 0; i < width; ++i) sums[0][i] += part[i];
      for (Index i = 0; i < width; ++i) sums[1][i] += part[in.n + i];
    }
    for (Index i = 0; i < width; ++i) in.dscale[begin + i] = static_cast<A>(sums[0][i]);
    for (Index i = 0; i < width; ++i) in.dbias[begin + i] = static_cast<A>(sums[1][i]);
  }
}

template <class T, class Pool>
void run(const RowsBackward<T>& in, Pool& pool) {
  parallel_for(pool, in.blocks, [&](Index block) { rows_backward(in, block); });
  if (in.dscale == nullptr) return;
  constexpr Index kStep = 512;
  parallel_for(pool, (in.n + kStep - 1) / kStep, [&](Index i) {
    sum_parts(in, i * kStep, std::min(in.n, (i + 1) * kStep));
  });
}

}  // namespace normjax

#endif  // NORMJAX_ROWS_H_
