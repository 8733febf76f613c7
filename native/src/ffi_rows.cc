// The FFI handlers of norms over rows.

#include "handlers.h"
#include "rows.h"

namespace normjax {
namespace {

namespace ffi = xla::ffi;

ffi::Error rows_forward_call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale,
                        ffi::AnyBuffer bias, ffi::AnyBuffer epsilon,
                        ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> mean,
                        ffi::Result<ffi::AnyBuffer> m2, bool centered, double divisor) {
  const Index rows = x.dimensions()[0], n = x.dimensions()[1];
  return by_dtype(x.element_type(), [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const RowsForward<T> in{rows, n, centered, prepare_large(y), static_cast<A>(divisor), *entries<A>(epsilon),
                            entries<T>(x), entries<A>(scale), entries<A>(bias),
                            entries<T>(y), entries<A>(mean), entries<A>(m2)};
    run(in, pool);
  });
}

ffi::Error rows_backward_call(ffi::ThreadPool pool, ffi::AnyBuffer dy, ffi::AnyBuffer x,
                         ffi::AnyBuffer mean, ffi::AnyBuffer inverse, ffi::AnyBuffer scale,
                         ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dscale,
                         ffi::Result<ffi::AnyBuffer> dbias, ffi::Result<ffi::AnyBuffer> parts,
                         bool centered, double divisor) {
  const Index rows = x.dimensions()[0], n = x.dimensions()[1];
  const Index blocks = parts->dimensions()[0];
  return by_dtype(x.element_type(), [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const RowsBackward<T> in{rows, n, blocks, centered, prepare_large(dx), static_cast<A>(divisor),
                             entries<T>(dy), entries<T>(x), entries<A>(mean),
                             entries<A>(inverse), entries<A>(scale), entries<T>(dx),
                             entries<A>(dscale), entries<A>(dbias), entries<A>(parts)};
    run(in, pool);
  });
}

}  // namespace

NORMJAX_HANDLER(
    normjax_rows_forward, rows_forward_call,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>()
        .Attr<bool>("centered")
        .Attr<double>("divisor"));

NORMJAX_HANDLER(
    normjax_rows_backward, rows_backward_call,
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
        .Ret<ffi::AnyBuffer>()
        .Attr<bool>("centered")
        .Attr<double>("divisor"));

}  // namespace normjax
