// The kernels for AVX2 with FMA.
#include "shared.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define AUTOFOCUS_ISA avx2
#define AUTOFOCUS_VECTOR_BYTES 32
#include "kernels_isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace autofocus {
constexpr Kernels avx2_kernels = avx2::entries("avx2");
}
#endif
