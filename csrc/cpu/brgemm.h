// The bfloat16 GEMM that torch carries (oneDNN's brgemm): AMX where the CPU has it, AVX512_BF16 where it has that.
//
// torch exports it but promises nothing about it, so it is looked up weakly and checked once before it is trusted;
// without it, bfloat16 tensors are computed in float32.
#pragma once

#include <cstdint>

namespace autofocus {

// Whether products of bfloat16 are to be had, and right, on this CPU with this torch.
bool brgemm_works();

// c[m][n] (+)= sum_k a[m][k] b[k][n] with float c and b in pairs of k: [depth / 2][columns][2]. `depth` is even,
// `columns` (also the row length of b) a multiple of 16. Subnormal numbers count as zero, as in torch's own products.
void brgemm(const uint16_t* a, int64_t a_row, const uint16_t* b, float* c, int64_t c_row, int64_t rows, int64_t columns,
            int64_t depth, bool accumulate);

// To be called by every thread after its last brgemm: AMX tiles hold state.
void brgemm_done();

}  // namespace autofocus
