// The kernels on the test pool. They are compiled in the files kernels_*.cc.

#ifndef NORMJAX_TESTS_KERNELS_H_
#define NORMJAX_TESTS_KERNELS_H_

#include "columns.h"
#include "pool.h"
#include "rows.h"

#define NORMJAX_ROWS(storage, T)                                     \
  storage template void run(const RowsForward<T>&, test::ThreadPool&); \
  storage template void run(const RowsBackward<T>&, test::ThreadPool&);

#define NORMJAX_COLUMNS(storage, T)                                       \
  storage template void run(const ColumnsMoments<T>&, test::ThreadPool&); \
  storage template void run(const ColumnsForward<T>&, test::ThreadPool&); \
  storage template void run(const ColumnsBackward<T>&, test::ThreadPool&);

#define NORMJAX_EACH_DTYPE(kernels, storage) \
  kernels(storage, float)                    \
  kernels(storage, double)                   \
  kernels(storage, BFloat16)                 \
  kernels(storage, Float16)

namespace normjax {

NORMJAX_EACH_DTYPE(NORMJAX_ROWS, extern)
NORMJAX_EACH_DTYPE(NORMJAX_COLUMNS, extern)

}  // namespace normjax

#endif  // NORMJAX_TESTS_KERNELS_H_
