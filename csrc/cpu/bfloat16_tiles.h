// Tiles of floats rounded to bfloat16, in the layouts of bfloat16_gemm.h. Only where has_bfloat16_gemm(): they take
// AVX512_BF16.
#pragma once

#include <cstdint>

namespace autofocus {

// to[row][k] = from[row][k], and zeros up to the depth that products have.
void round_rows(const float* from, int64_t from_row, int64_t rows, int64_t depth, uint16_t* to, int64_t to_row);

// to[k / 2][column][k % 2] = from[k][column], and zeros up to the depth that products have. `columns` is a multiple of
// 16.
void round_pairs(const float* from, int64_t from_row, int64_t depth, int64_t columns, uint16_t* to);

// to[column][k] = from[k][column], and zeros up to the depth that products have. Rows of `from` can be read as far as a
// multiple of 16.
void round_transposed(const float* from, int64_t from_row, int64_t depth, int64_t columns, uint16_t* to,
                      int64_t to_row);

}  // namespace autofocus
