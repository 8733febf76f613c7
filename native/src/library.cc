// What a library was built for, and which library this processor needs.

#include "xla/ffi/api/c_api.h"

#define NORMJAX_EXPORT extern "C" __attribute__((visibility("default")))

// The version of the kernels' arguments; increase it when they change.
NORMJAX_EXPORT int normjax_interface() { return 1; }

// The version of XLA's foreign function interface.
NORMJAX_EXPORT int normjax_xla_ffi_major() { return XLA_FFI_API_MAJOR; }

NORMJAX_EXPORT int normjax_xla_ffi_minor() { return XLA_FFI_API_MINOR; }

// The name of the best library for this processor, as in CMakeLists.txt.
NORMJAX_EXPORT const char* normjax_processor() {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return "x86-64-v4";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("fma")) {
    return "x86-64-v3";
  }
#endif
  return "baseline";
}
