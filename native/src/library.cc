// What the library is built for.

#include "xla/ffi/api/c_api.h"

#define NORMJAX_EXPORT extern "C" __attribute__((visibility("default")))

// The arguments of the kernels; another number where they are others.
NORMJAX_EXPORT int normjax_interface() { return 1; }

// The version of the interface between XLA and its libraries.
NORMJAX_EXPORT int normjax_xla_ffi_major() { return XLA_FFI_API_MAJOR; }

NORMJAX_EXPORT int normjax_xla_ffi_minor() { return XLA_FFI_API_MINOR; }
