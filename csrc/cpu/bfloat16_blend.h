// The blend of blend.h for inputs of bfloat16 that a product of bfloat16 follows: read as they are, added up in float,
// rounded once. Only where has_bfloat16_gemm(): it takes AVX512_BF16.
#pragma once

#include <cstdint>

namespace autofocus {

// A vector of so many numbers of bfloat16 holds channel i of a block and channel i + 16 side by side: as floats they
// are a shift and a mask away. Where 16 channels or less are left, half a block holds them in order.
constexpr int64_t kBlockChannels = 32;

// to[voxel][channel] = from[voxel][channel], which are numbers of bfloat16, in blocks. Rows hold `width` channels, a
// multiple of 16.
void pack_blocks(const float* from, int64_t count, int64_t width, uint16_t* to);

// to[voxel][channel] = sum over the branches of attention[branch][voxel] source[branch][voxel][channel], the sources in
// blocks; zeros without a branch. Two blocks at most, so 64 channels, and no more than those are written.
void blend(int branches, const float* const* attention, const uint16_t* const* source, int64_t source_step,
           uint16_t* to, int64_t to_step, int64_t count, int64_t channels);

}  // namespace autofocus
