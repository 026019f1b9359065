// What the instruction sets share, for kernels_<isa>.cpp to include before it switches one on: the linker keeps one
// copy of an inline function, and that must run on every CPU.
#pragma once

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
#include "bfloat16_blend.h"
#include "bfloat16_gemm.h"
#include "bfloat16_tiles.h"
#include "kernels.h"
#include "lattice.h"
#include "scratch.h"
#include "slabs.h"
#include "tile.h"
#include "view.h"
