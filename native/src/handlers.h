// Shared code of the FFI handlers: from XLA buffers to typed arrays.

#ifndef NORMJAX_HANDLERS_H_
#define NORMJAX_HANDLERS_H_

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

// Defines an exported function that XLA calls.
#define NORMJAX_HANDLER(name, function, binding)                 \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* \
  name(XLA_FFI_CallFrame* frame);                                \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, binding)

namespace normjax {

// Returns whether a result is so large that it does not fit into the cache and is to be streamed.
//
// Such a result may be in memory that the system has not mapped yet, which takes longer than a norm.
// In huge pages, as NumPy asks for too, it takes a fraction of that.
inline bool prepare_large(xla::ffi::Result<xla::ffi::AnyBuffer>& result) {
  constexpr std::uintptr_t kLarge = 8 << 20, kHugePage = 2 << 20;
  if (result->size_bytes() < kLarge) return false;
#ifdef MADV_HUGEPAGE
  const auto address = reinterpret_cast<std::uintptr_t>(result->untyped_data());
  const std::uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (address + result->size_bytes()) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return true;
}

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
