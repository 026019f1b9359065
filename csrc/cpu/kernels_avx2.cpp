// The kernels for AVX2 with FMA.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "arguments.h"
#include "bfloat16_gemm.h"
#include "bfloat16_tiles.h"
#include "kernels.h"
#include "lattice.h"
#include "scratch.h"
#include "slabs.h"
#include "tile.h"
#include "view.h"

#if defined(__x86_64__)
// Only what follows is compiled for these instructions: shared inline functions above must run on every CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
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
const Kernels avx2_kernels = {
    "avx2",
    avx2::forward_of,
    avx2::backward_of,
    avx2::branch_statistics_of,
    avx2::branch_combine_of,
    avx2::branch_reduce_of,
    avx2::branch_norm_backward_of,
};
}
#endif
