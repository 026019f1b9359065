// The kernels for no particular instruction set: vectors of 16 bytes, which every 64-bit CPU has.
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

#define AUTOFOCUS_ISA generic
#define AUTOFOCUS_VECTOR_BYTES 16
#include "kernels_isa.h"
namespace autofocus {
const Kernels generic_kernels = {
    "generic",
    generic::forward_of,
    generic::backward_of,
    generic::branch_statistics_of,
    generic::branch_combine_of,
    generic::branch_reduce_of,
    generic::branch_norm_backward_of,
};
}
