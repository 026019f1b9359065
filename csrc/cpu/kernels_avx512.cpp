// The kernels for AVX-512.
#include "shared.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define AUTOFOCUS_ISA avx512
#define AUTOFOCUS_VECTOR_BYTES 64
#include "kernels_isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace autofocus {
constexpr Kernels avx512_kernels = avx512::entries("avx512");
}
#endif
