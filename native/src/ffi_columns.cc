// The FFI handlers of norms over columns.

#include "columns.h"
#include "handlers.h"

namespace normjax {
namespace {

namespace ffi = xla::ffi;

// x has shape (examples, rows, features), parts has shape (.., blocks, 2, features).
template <class T>
Pieces pieces_of(ffi::AnyBuffer& x, ffi::Result<ffi::AnyBuffer>& parts) {
  const auto sizes = parts->dimensions();
  const Index blocks = sizes[sizes.size() - 3];
  return Pieces(x.dimensions()[1], x.dimensions()[2], blocks, kLanes<Accumulator<T>>);
}

ffi::Error moments_call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> mean,
                        ffi::Result<ffi::AnyBuffer> m2, ffi::Result<ffi::AnyBuffer> parts) {
  return by_dtype(x.element_type(), [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    run(ColumnsMoments<T>{x.dimensions()[0], pieces_of<T>(x, parts), entries<T>(x),
                          entries<A>(mean), entries<A>(m2), entries<A>(parts)},
        pool);
  });
}

ffi::Error forward_call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale,
                        ffi::AnyBuffer bias, ffi::AnyBuffer epsilon,
                        ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> mean,
                        ffi::Result<ffi::AnyBuffer> m2, ffi::Result<ffi::AnyBuffer> parts,
                        ffi::Result<ffi::AnyBuffer> vectors) {
  return by_dtype(x.element_type(), [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    run(ColumnsForward<T>{x.dimensions()[0], mean->dimensions()[1], prepare_large(y),
                          pieces_of<T>(x, parts), *entries<A>(epsilon), entries<T>(x),
                          entries<A>(scale), entries<A>(bias), entries<T>(y), entries<A>(mean),
                          entries<A>(m2), entries<A>(parts), entries<A>(vectors)},
        pool);
  });
}

ffi::Error backward_call(ffi::ThreadPool pool, ffi::AnyBuffer dy, ffi::AnyBuffer x,
                         ffi::AnyBuffer mean, ffi::AnyBuffer inverse, ffi::AnyBuffer scale,
                         ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> sums,
                         ffi::Result<ffi::AnyBuffer> parts, ffi::Result<ffi::AnyBuffer> vectors) {
  return by_dtype(x.element_type(), [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    run(ColumnsBackward<T>{x.dimensions()[0], mean.dimensions()[1], prepare_large(dx),
                           pieces_of<T>(x, parts), entries<T>(dy), entries<T>(x), entries<A>(mean),
                           entries<A>(inverse), entries<A>(scale), entries<T>(dx),
                           entries<A>(sums), entries<A>(parts), entries<A>(vectors)},
        pool);
  });
}

}  // namespace

NORMJAX_HANDLER(normjax_columns_moments, moments_call,
                ffi::Ffi::Bind()
                    .Ctx<ffi::ThreadPool>()
                    .Arg<ffi::AnyBuffer>()
                    .Ret<ffi::AnyBuffer>()
                    .Ret<ffi::AnyBuffer>()
                    .Ret<ffi::AnyBuffer>());

NORMJAX_HANDLER(normjax_columns_forward, forward_call,
                ffi::Ffi::Bind()
                    .Ctx<ffi::ThreadPool>()
                    .Arg<ffi::AnyBuffer>()
                    .Arg<ffi::AnyBuffer>()
                    .Arg<ffi::AnyBuffer>()
                    .Arg<ffi::AnyBuffer>()
                    .Ret<ffi::AnyBuffer>()
                    .Ret<ffi::AnyBuffer>()
                    .Ret<ffi::AnyBuffer>()
                    .Ret<ffi::AnyBuffer>()
                    .Ret<ffi::AnyBuffer>());

NORMJAX_HANDLER(normjax_columns_backward, backward_call,
                ffi::Ffi::Bind()
                    .Ctx<ffi::ThreadPool>()
                    .Arg<ffi::AnyBuffer>()
                    .Arg<ffi::AnyBuffer>()
                    .Arg<ffi::AnyBuffer>()
                    .Arg<ffi::AnyBuffer>()
                    .Arg<ffi::AnyBuffer>()
                    .Ret<ffi::AnyBuffer>()
                    .Ret<ffi::AnyBuffer>()
                    .Ret<ffi::AnyBuffer>()
                    .Ret<ffi::AnyBuffer>());

}  // namespace normjax
