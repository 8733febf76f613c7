// Arrays with more than 2^31 entries of BFloat16. They read 4 GB, mostly zeros that need no memory,
// and write 4 GB.

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "arrays.h"
#include "check.h"
#include "kernels.h"
#include "oracle.h"

namespace normjax::test {
namespace {

constexpr Index kBeyond = Index{1} << 31;

// Zeros that use memory only where they are written.
template <class T>
class Mapped {
 public:
  explicit Mapped(Index n) : bytes_(n * sizeof(T)) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    CHECK(memory_ != MAP_FAILED, "bytes", bytes_);
    if (memory_ == MAP_FAILED) memory_ = nullptr;
    // Fewer page faults.
    if (memory_ != nullptr) madvise(memory_, bytes_, MADV_HUGEPAGE);
  }
  ~Mapped() {
    if (memory_ != nullptr) munmap(memory_, bytes_);
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;

  T* data() const { return static_cast<T*>(memory_); }

 private:
  std::size_t bytes_;
  void* memory_;
};

// Only the first and last entries of a row or of a column are not zero.
constexpr Index kOwn = 1000;

template <class Body>
void for_each_own(Index n, Body body) {
  for (Index i = 0; i < std::min(kOwn, n); ++i) body(i);
  for (Index i = std::max(kOwn, n - kOwn); i < n; ++i) body(i);
}

void fill_own(BFloat16* x, Index n, Index stride, std::uint64_t seed) {
  Random random(seed);
  const double mean = 1 + seed % 7;
  for_each_own(n, [&](Index i) { x[i * stride] = nearest<BFloat16>(mean + random.number()); });
}

Moments moments_of(const BFloat16* x, Index n, Index stride) {
  Moments found;
  for_each_own(n, [&](Index i) { found.mean += real(x[i * stride]); });
  found.mean /= n;
  found.m2 = std::max<Index>(0, n - 2 * kOwn) * found.mean * found.mean;
  for_each_own(n, [&](Index i) {
    const Real d = real(x[i * stride]) - found.mean;
    found.m2 += d * d;
  });
  return found;
}

void check_row(const RowsForward<BFloat16>& in, Index row) {
  const BFloat16 *x = in.x + row * in.n, *y = in.y + row * in.n;
  const Moments m = moments_of(x, in.n, 1);
  CHECK(std::abs(in.mean[row] - m.mean) <= mean_tolerance<float>(m, in.n), "row", row, m.mean,
        in.mean[row]);
  CHECK(std::abs(in.m2[row] - m.m2) <= m2_tolerance<float>(m, in.n, false), "row", row, m.m2,
        in.m2[row]);
  const Real inverse = 1 / std::sqrt(m.m2 / in.divisor + in.epsilon);
  for_each_own(in.n, [&](Index i) {
    const Real expected = (real(x[i]) - m.mean) * inverse;
    const Real allowed = y_tolerance<BFloat16>(m.mean, inverse, expected, 1, 0, expected);
    CHECK(std::abs(real(y[i]) - expected) <= allowed, "row", row, "i", i, expected, real(y[i]));
  });
}

// Some rows are not zero; each has a different mean.
void test_rows(Index rows, Index n, const std::vector<Index>& own) {
  const Mapped<BFloat16> x(rows * n), y(rows * n);
  if (x.data() == nullptr || y.data() == nullptr) return;
  std::vector<float> mean(rows), m2(rows);
  for (Index row : own) fill_own(x.data() + row * n, n, 1, row);
  const RowsForward<BFloat16> in{rows,     n,       true,    true,     float(n),    1e-5f,
                                 x.data(), nullptr, nullptr, y.data(), mean.data(), m2.data()};
  run(in, shared_pool(2));
  for (Index row : own) check_row(in, row);
  for (Index row = 0; row < rows; ++row) {
    const bool zero = std::find(own.begin(), own.end(), row) == own.end();
    CHECK(!zero || (mean[row] == 0 && m2[row] == 0), "row", row, mean[row], m2[row]);
  }
}

// Only the columns of the last example are not zero.
void test_columns(Index examples, Index rows, Index features) {
  const Index blocks = rows / 512;
  const Mapped<BFloat16> x(examples * rows * features);
  const Mapped<float> parts(examples * blocks * 2 * features);
  if (x.data() == nullptr || parts.data() == nullptr) return;
  BFloat16* last = x.data() + (examples - 1) * rows * features;
  for (Index k = 0; k < features; ++k) fill_own(last + k, rows, features, k);
  std::vector<float> mean(examples * features), m2(mean.size());
  const Pieces pieces(rows, features, blocks, kLanes<float>);
  run(ColumnsMoments<BFloat16>{examples, pieces, x.data(), mean.data(), m2.data(), parts.data()},
      shared_pool(2));
  for (Index k = 0; k < features; ++k) {
    const Moments m = moments_of(last + k, rows, features);
    const Index i = (examples - 1) * features + k;
    CHECK(std::abs(mean[i] - m.mean) <= mean_tolerance<float>(m, rows), k, m.mean, mean[i]);
    CHECK(std::abs(m2[i] - m.m2) <= m2_tolerance<float>(m, rows, true), k, m.m2, m2[i]);
  }
  for (Index i = 0; i < (examples - 1) * features; ++i) {
    CHECK(mean[i] == 0 && m2[i] == 0, "column", i, mean[i], m2[i]);
  }
}

}  // namespace

void test_large(Suite& suite) {
  constexpr Index kRows = kBeyond / 4096 + 3;
  suite.test("large: many rows", [] { test_rows(kRows, 4096, {0, kRows / 2, kRows - 1}); });
  suite.test("large: one long row", [] { test_rows(1, kBeyond + 9, {0}); });
  suite.test("large: columns of one example", [] { test_columns(1, kBeyond / 1024 + 5, 1024); });
  suite.test("large: columns of two examples", [] { test_columns(2, kBeyond / 200 + 3, 100); });
}

}  // namespace normjax::test
