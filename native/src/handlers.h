// Shared code of the FFI handlers: from XLA buffers to typed arrays.

#ifndef NORMJAX_HANDLERS_H_
#define NORMJAX_HANDLERS_H_

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

// Defines an exported function that XLA calls.
#define NORMJAX_HANDLER(name, function, binding)                 \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* \
  name(XLA_FFI_CallFrame* frame);                                \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, binding)

namespace normjax {

// Results of at least this many bytes bypass the cache, since they do not fit into it.
constexpr std::size_t kStreamed = 8 << 20;

// The entries of a buffer. Null if it is empty, which means that the array is absent.
template <class T, class Buffer>
T* entries(Buffer& buffer) {
  if constexpr (std::is_same_v<Buffer, xla::ffi::AnyBuffer>) {
    return buffer.element_count() == 0 ? nullptr : static_cast<T*>(buffer.untyped_data());
  } else {
    return buffer->element_count() == 0 ? nullptr : static_cast<T*>(buffer->untyped_data());
  }
}

// Calls call(T{}) with the C++ type T of a dtype.
template <class Call>
xla::ffi::Error by_dtype(xla::ffi::DataType dtype, Call call) {
  switch (dtype) {
    case xla::ffi::DataType::F32:
      call(float{});
      break;
    case xla::ffi::DataType::F64:
      call(double{});
      break;
    case xla::ffi::DataType::BF16:
      call(BFloat16{});
      break;
    case xla::ffi::DataType::F16:
      call(Float16{});
      break;
    default:
      return xla::ffi::Error::InvalidArgument("normjax-cpu has no kernel for this dtype");
  }
  return xla::ffi::Error::Success();
}

}  // namespace normjax

#endif  // NORMJAX_HANDLERS_H_
