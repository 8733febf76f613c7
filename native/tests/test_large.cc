// Arrays of more than 2^31 entries: 4 GB of BFloat16 that are read, and as many that are written.

#include <sys/mman.h>

#include <cmath>
#include <string>
#include <vector>

#include "arrays.h"
#include "check.h"
#include "kernels.h"
#include "oracle.h"

namespace normjax::test {
namespace {

constexpr Index kBeyond = Index{1} << 31;

// Zeros that take memory only where they are written.
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

Moments moments_of(const BFloat16* x, Index n, Index stride) {
  Moments found;
  for (Index i = 0; i < n; ++i) found.mean += real(x[i * stride]);
  found.mean /= n;
  for (Index i = 0; i < n; ++i) {
    const Real d = real(x[i * stride]) - found.mean;
    found.m2 += d * d;
  }
  return found;
}

void fill_row(BFloat16* x, Index n, std::uint64_t seed) {
  Random random(seed);
  for (Index i = 0; i < n; ++i) x[i] = nearest<BFloat16>(seed + random.number());
}

void check_row(const RowsForward<BFloat16>& in, Index row) {
  const BFloat16 *x = in.x + row * in.n, *y = in.y + row * in.n;
  const Moments m = moments_of(x, in.n, 1);
  CHECK(std::abs(in.mean[row] - m.mean) <= mean_tolerance<float>(m, in.n), "row", row, m.mean,
        in.mean[row]);
  CHECK(std::abs(in.m2[row] - m.m2) <= m2_tolerance<float>(m, in.n, false), "row", row, m.m2,
        in.m2[row]);
  const Real inverse = 1 / std::sqrt(m.m2 / in.divisor + in.epsilon);
  for (Index i = 0; i < in.n; ++i) {
    const Real expected = (real(x[i]) - m.mean) * inverse;
    const Real allowed = y_tolerance<BFloat16>(m.mean, inverse, expected, 1, 0, expected);
    CHECK(std::abs(real(y[i]) - expected) <= allowed, "row", row, "i", i, expected, real(y[i]));
  }
}

// Each row of its own mean, the first and the last ones; all others are zeros.
void test_rows(Index rows, Index n) {
  const Mapped<BFloat16> x(rows * n), y(rows * n);
  if (x.data() == nullptr || y.data() == nullptr) return;
  std::vector<float> mean(rows), m2(rows);
  const std::vector<Index> own = {0, rows / 2, rows - 2, rows - 1};
  for (Index row : own) fill_row(x.data() + row * n, n, 2 + row % 7);
  const RowsForward<BFloat16> in{rows,     n,       true,    true,     float(n),    1e-5f,
                                 x.data(), nullptr, nullptr, y.data(), mean.data(), m2.data()};
  run(in, shared_pool(2));
  for (Index row : own) check_row(in, row);
  for (Index row = 1; row < rows / 2; ++row) {
    CHECK(mean[row] == 0 && m2[row] == 0, "row", row, mean[row], m2[row]);
  }
}

// The last rows of the last example are not zeros, nor is its first row.
void test_columns(Index examples, Index rows, Index features) {
  constexpr Index kOwn = 1000, kBlocks = 512;
  const Mapped<BFloat16> x(examples * rows * features);
  if (x.data() == nullptr) return;
  BFloat16* last = x.data() + (examples - 1) * rows * features;
  fill_row(last, features, 3);
  for (Index row = rows - kOwn; row < rows; ++row) fill_row(last + row * features, features, row);
  std::vector<float> mean(examples * features), m2(mean.size());
  std::vector<float> parts(examples * kBlocks * 2 * features);
  const Pieces pieces(rows, features, kBlocks, kLanes<float>);
  run(ColumnsMoments<BFloat16>{examples, pieces, x.data(), mean.data(), m2.data(), parts.data()},
      shared_pool(2));
  for (Index column : {Index{0}, features / 2, features - 1}) {
    const Moments m = moments_of(last + column, rows, features);
    const Index i = (examples - 1) * features + column;
    CHECK(std::abs(mean[i] - m.mean) <= mean_tolerance<float>(m, rows), column, m.mean, mean[i]);
    CHECK(std::abs(m2[i] - m.m2) <= m2_tolerance<float>(m, rows, true), column, m.m2, m2[i]);
  }
  for (Index i = 0; i < (examples - 1) * features; ++i) {
    CHECK(mean[i] == 0 && m2[i] == 0, "column", i, mean[i], m2[i]);
  }
}

}  // namespace

void test_large(Suite& suite) {
  suite.test("large: many rows", [] { test_rows(kBeyond / 4096 + 3, 4096); });
  suite.test("large: few long rows", [] { test_rows(5, kBeyond / 5 + 2); });
  suite.test("large: columns of one example", [] { test_columns(1, kBeyond / 1024 + 5, 1024); });
  suite.test("large: columns of two examples", [] { test_columns(2, kBeyond / 200 + 3, 100); });
}

}  // namespace normjax::test
