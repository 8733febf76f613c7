// The versions of the interfaces that the library was built for.

#include "xla/ffi/api/c_api.h"

#define NORMJAX_EXPORT extern "C" __attribute__((visibility("default")))

// The version of the kernels' arguments; increase it when they change.
NORMJAX_EXPORT int normjax_interface() { return 1; }

// The version of XLA's foreign function interface.
NORMJAX_EXPORT int normjax_xla_ffi_major() { return XLA_FFI_API_MAJOR; }

NORMJAX_EXPORT int normjax_xla_ffi_minor() { return XLA_FFI_API_MINOR; }
