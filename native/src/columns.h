// Norms over columns: x has shape (examples, rows, features). Each feature of an example is summed
// over the rows, and each group of adjacent features has its own statistics. Batch norm has one
// example; instance norm has groups of one feature.

#ifndef NORMJAX_COLUMNS_H_
#define NORMJAX_COLUMNS_H_

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "parallel.h"
#include "vectors.h"

namespace normjax {

// The number of columns that are summed at a time. Their sums fit into the cache of a core.
constexpr Index kColumns = 1024;

// The number of rows from which a mean is estimated.
constexpr Index kHead = 16;

// The prefetch distance of a sum over rows, in entries.
constexpr Index kAhead = 1024;

// How rows are divided into blocks. It does not depend on the number of threads.
//
// If there are few features, several rows are processed as one wide row, and the columns of one
// feature are merged at the end. So loops over columns are long for any number of features.
struct Pieces {
  Index rows, features, blocks;
  Index fold = 1;        // Rows in a wide row.
  Index block_rows = 0;  // Rows in a block, a multiple of fold.

  Pieces(Index rows, Index features, Index blocks, Index lanes)
      : rows(rows), features(features), blocks(blocks) {
    constexpr Index kWide = 256;
    if (features < kWide) {
      // A wide row is a multiple of a vector, unless that has more than kColumns columns.
      const Index whole = lanes / std::gcd(features, lanes);
      fold = whole * features <= kColumns ? whole * std::max<Index>(1, kWide / (whole * features))
                                          : 1;
    }
    const Index share = (rows + blocks - 1) / blocks;
    block_rows = (share + fold - 1) / fold * fold;
  }

  Index begin(Index block) const { return std::min(rows, block * block_rows); }
  Index end(Index block) const { return begin(block + 1); }
};

// Columns of a block that are summed together.
struct Tile {
  Index first;   // The first column.
  Index width;   // The number of columns.
  Index stride;  // The distance between wide rows, in entries.
  Index full;    // The number of full wide rows.
  Index tail;    // The number of entries in the last, incomplete wide row.

  // The number of entries in a column of the tile.
  Index count(Index column) const { return full + (column < tail ? 1 : 0); }
};

// Calls body(tile, offset) for each tile of a block; offset is that of the first entry in x.
template <class Body>
NORMJAX_INLINE void for_each_tile(const Pieces& pieces, Index block, Body body) {
  const Index begin = pieces.begin(block), rows = pieces.end(block) - begin;
  const Index features = pieces.features, offset = begin * features;
  if (pieces.fold > 1) {
    const Index width = pieces.fold * features;
    body(Tile{0, width, width, rows / pieces.fold, rows % pieces.fold * features}, offset);
    return;
  }
  for (Index c = 0; c < features; c += kColumns) {
    body(Tile{c, std::min(kColumns, features - c), features, rows, 0}, offset + c);
  }
}

// Sums terms(i, w, lanes, out) in each column w over all entries i of a tile. It adds `Together`
// rows before it adds to the sums: the long sums have fewer terms and so fewer roundings, and they
// are loaded and stored less often.
template <class A, int N, int Together, class Terms>
NORMJAX_INLINE void sum_rows(const Tile& tile, A (&sums)[N][kColumns], Terms terms) {
  const auto add = [&](Index width, auto rows, Index i) NORMJAX_INLINE_LAMBDA {
    for_each_vector<A>(width, [&](Index w, auto part) NORMJAX_INLINE_LAMBDA {
      Vector<A> total[N];
      terms(i + w, w, part, total);
      for (int r = 1; r < rows(); ++r) {
        Vector<A> more[N];
        terms(i + r * tile.stride + w, w, part, more);
        for (int k = 0; k < N; ++k) total[k] += more[k];
      }
      for (int k = 0; k < N; ++k) {
        store(sums[k] + w, load(sums[k] + w, existing(part)) + total[k], existing(part));
      }
    });
  };
  for (int k = 0; k < N; ++k) std::fill_n(sums[k], tile.width, A{0});
  constexpr std::integral_constant<int, Together> kTogether{};
  constexpr std::integral_constant<int, 1> kOne{};
  Index row = 0;
  for (; row + Together <= tile.full; row += Together) add(tile.width, kTogether, row * tile.stride);
  for (; row < tile.full; ++row) add(tile.width, kOne, row * tile.stride);
  if (tile.tail > 0) add(tile.tail, kOne, row * tile.stride);
}

// Mean and sum of squared deviations of a column, by the merge of Chan, Golub, LeVeque (1983).
struct ColumnMoments {
  double mean, m2;
};

// Merges `pieces` pieces; of(p) returns piece p.
template <class Of>
NORMJAX_INLINE ColumnMoments merged(Index pieces, Of of) {
  // Relative to the first mean, so that equal means are merged without rounding.
  const double first = of(0).mean;
  double count = 0, mean = 0, m2 = 0;
  for (Index p = 0; p < pieces; ++p) {
    const auto [n, m, s] = of(p);
    count += n;
    mean += n * (m - first);
  }
  mean = first + mean / std::max(count, 1.0);
  for (Index p = 0; p < pieces; ++p) {
    const auto [n, m, s] = of(p);
    m2 += s + n * (m - mean) * (m - mean);
  }
  return {mean, m2};
}

struct Piece {
  double count, mean, m2;
};

// Moves a center to the mean of its column if it is farther from it than the standard deviation,
// since sums around such a center lose digits of m2. Returns whether any was moved.
template <class A>
NORMJAX_INLINE bool move_far_centers(const Tile& tile, const A (&sums)[2][kColumns],
                                     A (&center)[kColumns]) {
  constexpr A kLargest = std::numeric_limits<A>::max();
  bool any = false;
  for (Index w = 0; w < tile.width; ++w) {
    const A n = static_cast<A>(tile.count(w)), sum = sums[0][w], squares = sums[1][w];
    // The negation is also true for NaN.
    const bool far = !(sum * sum <= n / 2 * squares && squares <= kLargest);
    center[w] += far ? sum / std::max(n, A{1}) : A{0};
    any |= far;
  }
  return any;
}

// Writes mean and m2 of `features` features, from the sums of x - center and of its square in each
// column. Several columns of a feature are merged by Chan, Golub, LeVeque (1983).
template <class A>
NORMJAX_INLINE void moments_of_features(const Tile& tile, Index features, Index rows,
                                        const A (&center)[kColumns], const A (&sums)[2][kColumns],
                                        A* means, A* squares) {
  constexpr double kLargest = std::numeric_limits<A>::max();
  double count[kColumns], mean[kColumns], m2[kColumns];
  const double inverses[] = {1.0 / std::max<Index>(1, tile.full), 1.0 / (tile.full + 1)};
  for (Index w = 0; w < tile.width; ++w) {
    const double n = tile.count(w), square = sums[1][w];
    const double rest = sums[0][w] * (w < tile.tail ? inverses[1] : inverses[0]);
    count[w] = n;
    mean[w] = center[w] + rest;
    m2[w] = square <= kLargest ? std::max(0.0, square - rest * rest * n) : square;
  }
  // Relative to the first mean, so that equal means are merged without rounding.
  double total[kColumns] = {}, merged[kColumns] = {};
  for (Index w = 0; w < tile.width; w += features) {
    for (Index c = 0; c < features; ++c) total[c] += count[w + c] * (mean[w + c] - mean[c]);
  }
  const double inverse = 1.0 / std::max<Index>(1, rows);
  for (Index c = 0; c < features; ++c) total[c] = mean[c] + total[c] * inverse;
  for (Index w = 0; w < tile.width; w += features) {
    for (Index c = 0; c < features; ++c) {
      const double d = mean[w + c] - total[c];
      merged[c] += m2[w + c] + count[w + c] * d * d;
    }
  }
  for (Index c = 0; c < features; ++c) means[c] = static_cast<A>(total[c]);
  for (Index c = 0; c < features; ++c) squares[c] = static_cast<A>(merged[c]);
}

// Writes mean and m2 of each column of a block to parts (2, features).
//
// The sums are around the mean of the first rows. If such a center is too far from the mean of its
// column, a second pass follows.
template <class T>
void block_moments(const T* x, const Pieces pieces, Index block, Accumulator<T>* parts) {
  using A = Accumulator<T>;
  for_each_tile(pieces, block, [&](const Tile& tile, Index offset) NORMJAX_INLINE_LAMBDA {
    const T* from = x + offset;
    const Index features = std::min(pieces.features, tile.width);
    alignas(64) A sums[2][kColumns], center[kColumns] = {};
    const auto sum_deviations = [&](const Tile& rows) NORMJAX_INLINE_LAMBDA {
      sum_rows<A, 2, 4>(rows, sums, [&](Index i, Index w, auto part, auto& out) NORMJAX_INLINE_LAMBDA {
        prefetch<kLanes<A> * sizeof(T)>(from + i + 4 * tile.stride);
        const Vector<A> d = load(from + i, part) - load(center + w, part);
        out[0] = d;
        out[1] = d * d;
      });
    };
    const Index width = tile.full > 0 ? tile.width : tile.tail;
    map_vectors<A>(width, [&](Index w, auto part) NORMJAX_INLINE_LAMBDA {
      store(center + w, load(from + w, part), part);
    });
    Tile head = tile;
    head.full = std::min(tile.full, kHead);
    head.tail = tile.full > 0 ? 0 : tile.tail;
    sum_deviations(head);
    for (Index w = 0; w < tile.width; ++w) {
      center[w] += sums[0][w] / static_cast<A>(std::max<Index>(1, head.count(w)));
    }
    sum_deviations(tile);
    if (move_far_centers(tile, sums, center)) sum_deviations(tile);
    A* means = parts + tile.first;
    moments_of_features(tile, features, pieces.end(block) - pieces.begin(block), center, sums, means,
                        means + pieces.features);
  });
}

// Merges the mean and m2 of each column over the blocks; parts has shape (blocks, 2, features).
template <class A>
void merge_blocks(const A* parts, const Pieces pieces, A* mean, A* m2) {
  constexpr Index kWidth = 64;
  const Index features = pieces.features;
  for (Index begin = 0; begin < features; begin += kWidth) {
    const Index width = std::min(kWidth, features - begin);
    double means[kWidth] = {}, squares[kWidth] = {};
    for (Index b = 0; b < pieces.blocks; ++b) {
      const A* part = parts + 2 * b * features + begin;
      const double n = pieces.end(b) - pieces.begin(b);
      for (Index i = 0; i < width; ++i) means[i] += n * (double{part[i]} - parts[begin + i]);
    }
    const double rows = std::max<Index>(1, pieces.rows);
    for (Index i = 0; i < width; ++i) means[i] = parts[begin + i] + means[i] / rows;
    for (Index b = 0; b < pieces.blocks; ++b) {
      const A* part = parts + 2 * b * features + begin;
      const double n = pieces.end(b) - pieces.begin(b);
      for (Index i = 0; i < width; ++i) {
        const double d = part[i] - means[i];
        squares[i] += part[features + i] + n * d * d;
      }
    }
    for (Index i = 0; i < width; ++i) mean[begin + i] = static_cast<A>(means[i]);
    for (Index i = 0; i < width; ++i) m2[begin + i] = static_cast<A>(squares[i]);
  }
}

// Repeats a vector to the width of a wide row, a multiple of its size.
template <class A>
NORMJAX_INLINE void repeat(const A* vector, Index size, Index width, A* wide) {
  for (Index w = 0; w < width; w += size) std::copy_n(vector, size, wide + w);
}

// Writes the sums of t and of t (x - center) over the rows of a block to parts (2, features).
template <class T>
void block_sums(const T* t, const T* x, const Accumulator<T>* center, const Pieces pieces,
                Index block, Accumulator<T>* parts) {
  using A = Accumulator<T>;
  for_each_tile(pieces, block, [&](const Tile& tile, Index offset) NORMJAX_INLINE_LAMBDA {
    const T *t_from = t + offset, *x_from = x + offset;
    const Index features = std::min(pieces.features, tile.width);
    alignas(64) A sums[2][kColumns], wide[kColumns];
    repeat(center + tile.first, features, tile.width, wide);
    // Two arrays are read from memory. One row at a time is twice as fast as four rows of each,
    // which are eight streams.
    sum_rows<A, 2, 1>(tile, sums, [&](Index i, Index w, auto part, auto& out) NORMJAX_INLINE_LAMBDA {
      prefetch<kLanes<A> * sizeof(T)>(t_from + i + kAhead);
      prefetch<kLanes<A> * sizeof(T)>(x_from + i + kAhead);
      out[0] = load(t_from + i, part);
      out[1] = out[0] * (load(x_from + i, part) - load(wide + w, part));
    });
    for (int k = 0; k < 2; ++k) {
      double total[kColumns] = {};
      for (Index w = 0; w < tile.width; w += features) {
        for (Index c = 0; c < features; ++c) total[c] += sums[k][w + c];
      }
      A* part = parts + k * pieces.features + tile.first;
      for (Index c = 0; c < features; ++c) part[c] = static_cast<A>(total[c]);
    }
  });
}

// Sums parts (blocks, 2, features) over the blocks.
template <class A>
void add_blocks(const A* parts, const Pieces pieces, A* sums) {
  constexpr Index kWidth = 64;
  const Index end = 2 * pieces.features;
  for (Index begin = 0; begin < end; begin += kWidth) {
    const Index width = std::min(kWidth, end - begin);
    double total[kWidth] = {};
    for (Index b = 0; b < pieces.blocks; ++b) {
      const A* part = parts + 2 * b * pieces.features + begin;
      for (Index i = 0; i < width; ++i) total[i] += part[i];
    }
    for (Index i = 0; i < width; ++i) sums[begin + i] = static_cast<A>(total[i]);
  }
}

// Computes to = map(i, w, lanes, vectors) for all entries i of a block; w is the column of entry i.
// `vectors` are repeated to the width of a wide row.
template <class T, int N, class Map>
NORMJAX_INLINE void map_rows(const Pieces& pieces, Index block, const Accumulator<T>* vectors,
                             T* to, bool streams, Map map) {
  using A = Accumulator<T>;
  for_each_tile(pieces, block, [&](const Tile& tile, Index offset) NORMJAX_INLINE_LAMBDA {
    const Index features = std::min(pieces.features, tile.width);
    alignas(64) A wide[N][kColumns];
    for (int k = 0; k < N; ++k) {
      repeat(vectors + k * pieces.features + tile.first, features, tile.width, wide[k]);
    }
    const auto map_row = [&](Index i, Index width, auto put) NORMJAX_INLINE_LAMBDA {
      map_vectors<A>(width, [&](Index w, auto part) NORMJAX_INLINE_LAMBDA {
        put(to + i + w, map(i + w, w, part, wide), part);
      });
    };
    for (Index row = 0; row <= tile.full; ++row) {
      const Index i = offset + row * tile.stride, width = row < tile.full ? tile.width : tile.tail;
      const bool stream = streams && can_stream(to + i, width * sizeof(T));
      stream ? map_row(i, width, Stream{}) : map_row(i, width, Store{});
    }
  });
  finish_streams();
}

// y = (x - center) gain + shift, with vectors (3, features).
template <class T>
void block_normalize(const T* x, const Accumulator<T>* vectors, const Pieces pieces, Index block,
                     bool streams, T* y) {
  using A = Accumulator<T>;
  map_rows<T, 3>(pieces, block, vectors, y, streams,
                 [=](Index i, Index w, auto part, auto& own) NORMJAX_INLINE_LAMBDA {
                   const Vector<A> d = load(x + i, part) - load(own[0] + w, part);
                   return d * load(own[1] + w, part) + load(own[2] + w, part);
                 });
}

// dx = dy gain + (x - center) slope + shift, with vectors (4, features).
template <class T>
void block_propagate(const T* dy, const T* x, const Accumulator<T>* vectors, const Pieces pieces,
                     Index block, bool streams, T* dx) {
  using A = Accumulator<T>;
  map_rows<T, 4>(pieces, block, vectors, dx, streams,
                 [=](Index i, Index w, auto part, auto& own) NORMJAX_INLINE_LAMBDA {
                   const Vector<A> d = load(x + i, part) - load(own[0] + w, part);
                   return load(dy + i, part) * load(own[1] + w, part) +
                          (d * load(own[2] + w, part) + load(own[3] + w, part));
                 });
}

// Computes mean and m2 of each column of each example.
template <class T>
struct ColumnsMoments {
  using A = Accumulator<T>;
  Index examples;
  Pieces pieces;
  const T* x;
  A *mean, *m2;  // (examples, features)
  A* parts;      // (examples, blocks, 2, features)
};

template <class T, class Pool>
void run(const ColumnsMoments<T>& in, Pool& pool) {
  const Pieces& pieces = in.pieces;
  const Index features = pieces.features, entries = pieces.rows * features;
  const Index blocks = in.examples * pieces.blocks;
  // From the last block to the first: x is normalized next, and its beginning is then in the cache.
  parallel_for(pool, blocks, [&](Index item) {
    const Index b = blocks - 1 - item;
    block_moments(in.x + b / pieces.blocks * entries, pieces, b % pieces.blocks,
                  in.parts + b * 2 * features);
  });
  parallel_for(pool, in.examples, [&](Index example) {
    merge_blocks(in.parts + example * pieces.blocks * 2 * features, pieces,
                 in.mean + example * features, in.m2 + example * features);
  });
}

// Computes y, and mean and m2 of each group of each example.
template <class T>
struct ColumnsForward {
  using A = Accumulator<T>;
  Index examples, groups;
  bool streams;
  Pieces pieces;
  A epsilon;
  const T* x;
  const A *scale, *bias;  // (features), or null
  T* y;
  A *mean, *m2;  // (examples, groups)
  A* parts;      // (examples, blocks, 2, features)
  A* vectors;    // (examples, 3, features)
};

// Computes the moments of groups from those of their features, and the vectors that normalize x.
template <class T>
void normalize_groups(const ColumnsForward<T>& in, Index example, typename ColumnsForward<T>::A* vectors) {
  using A = Accumulator<T>;
  const Index features = in.pieces.features, size = features / in.groups;
  const double rows = in.pieces.rows;
  A *center = vectors, *gain = vectors + features, *shift = vectors + 2 * features;
  for (Index g = 0; g < in.groups; ++g) {
    const Index first = g * size;
    const ColumnMoments all = merged(size, [&](Index c) {
      return Piece{rows, center[first + c], gain[first + c]};
    });
    const A mean = static_cast<A>(all.mean), m2 = static_cast<A>(all.m2);
    const A inverse = A{1} / std::sqrt(m2 / static_cast<A>(rows * size) + in.epsilon);
    in.mean[example * in.groups + g] = mean;
    in.m2[example * in.groups + g] = m2;
    for (Index c = first; c < first + size; ++c) {
      center[c] = mean;
      gain[c] = in.scale == nullptr ? inverse : inverse * in.scale[c];
      shift[c] = in.bias == nullptr ? A{0} : in.bias[c];
    }
  }
}

template <class T, class Pool>
void run(const ColumnsForward<T>& in, Pool& pool) {
  const Pieces& pieces = in.pieces;
  const Index features = pieces.features, entries = pieces.rows * features;
  const auto parts = [&](Index example) { return in.parts + example * pieces.blocks * 2 * features; };
  const auto vectors = [&](Index example) { return in.vectors + example * 3 * features; };
  two_passes(
      pool, in.examples, pieces.blocks,
      [&](Index e, Index b) {
        block_moments(in.x + e * entries, pieces, b, parts(e) + 2 * b * features);
      },
      [&](Index e) {
        merge_blocks(parts(e), pieces, vectors(e), vectors(e) + features);
        normalize_groups(in, e, vectors(e));
      },
      [&](Index e, Index b) {
        block_normalize(in.x + e * entries, vectors(e), pieces, b, in.streams, in.y + e * entries);
      });
}

// With d = x - mean and inv = (var + epsilon)^(-1/2), where mean(.) is the mean over a group:
//
//     dx = inv (g - mean(g) - inv^2 d mean(g d)),   g = dy scale
//
// It also computes the sums of dy and of dy d over the rows, from which dbias and dscale follow.
template <class T>
struct ColumnsBackward {
  using A = Accumulator<T>;
  Index examples, groups;
  bool streams;
  Pieces pieces;
  const T *dy, *x;
  const A *mean, *inverse;  // (examples, groups)
  const A* scale;           // (features), or null
  T* dx;
  A* sums;     // (examples, 2, features)
  A* parts;    // (examples, blocks, 2, features)
  A* vectors;  // (examples, 4, features)
};

template <class T>
void propagate_groups(const ColumnsBackward<T>& in, Index example, typename ColumnsBackward<T>::A* vectors) {
  using A = Accumulator<T>;
  const Index features = in.pieces.features, size = features / in.groups;
  const double count = static_cast<double>(in.pieces.rows) * size;
  const A* sums = in.sums + example * 2 * features;
  for (Index g = 0; g < in.groups; ++g) {
    const Index first = g * size;
    double of_g = 0, of_products = 0;
    for (Index c = first; c < first + size; ++c) {
      const double scale = in.scale == nullptr ? 1 : in.scale[c];
      of_g += scale * sums[c];
      of_products += scale * sums[features + c];
    }
    // Multiply by inv one factor at a time, since inv^3 may overflow or underflow.
    const double inv = in.inverse[example * in.groups + g];
    for (Index c = first; c < first + size; ++c) {
      const double scale = in.scale == nullptr ? 1 : in.scale[c];
      vectors[features + c] = static_cast<A>(inv * scale);
      vectors[2 * features + c] = static_cast<A>(-(inv * (inv * (inv * (of_products / count)))));
      vectors[3 * features + c] = static_cast<A>(-inv * (of_g / count));
    }
  }
}

template <class T, class Pool>
void run(const ColumnsBackward<T>& in, Pool& pool) {
  const Pieces& pieces = in.pieces;
  const Index features = pieces.features, entries = pieces.rows * features;
  const auto parts = [&](Index example) { return in.parts + example * pieces.blocks * 2 * features; };
  const auto vectors = [&](Index example) { return in.vectors + example * 4 * features; };
  const Index size = features / in.groups;
  for (Index e = 0; e < in.examples; ++e) {
    for (Index g = 0; g < in.groups; ++g) {
      std::fill_n(vectors(e) + g * size, size, in.mean[e * in.groups + g]);
    }
  }
  two_passes(
      pool, in.examples, pieces.blocks,
      [&](Index e, Index b) {
        block_sums(in.dy + e * entries, in.x + e * entries, vectors(e), pieces, b,
                   parts(e) + 2 * b * features);
      },
      [&](Index e) {
        add_blocks(parts(e), pieces, in.sums + e * 2 * features);
        propagate_groups(in, e, vectors(e));
      },
      [&](Index e, Index b) {
        if (in.dx == nullptr) return;
        block_propagate(in.dy + e * entries, in.x + e * entries, vectors(e), pieces, b, in.streams,
                        in.dx + e * entries);
      });
}

}  // namespace normjax

#endif  // NORMJAX_COLUMNS_H_
