// Products of bfloat16, on AMX where the CPU has it (amx.h), else by AVX512_BF16 (avx512_bf16.h).
//
// Either is checked once before it is trusted; without both, bfloat16 tensors are computed in float32.
#pragma once

#include <cstdint>

// Compilers that know both instruction sets.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define AUTOFOCUS_HAS_BFLOAT16 1
#endif

namespace autofocus {

// Whether this CPU multiplies bfloat16, and does so rightly.
bool has_bfloat16_gemm();
// Whether it does that on AMX; if not, by AVX512_BF16.
bool has_amx();

// A product may read and write whole tiles. So a and c must have room for bfloat16_rows(rows) rows, whatever is in
// those beyond `rows`; a and b have bfloat16_depth(depth) elements along the sum, zeros beyond `depth`.
int64_t bfloat16_rows(int64_t rows);
int64_t bfloat16_depth(int64_t depth);

// c[m][n] (+)= sum_k a[m][k] b[k][n] with float c and b in pairs of k: [depth / 2][columns][2]. `columns` (also the row
// length of b) is a multiple of 16. Subnormal numbers count as zero, as in torch's own products.
void bfloat16_gemm(const uint16_t* a, int64_t a_row, const uint16_t* b, float* c, int64_t c_row, int64_t rows,
                   int64_t columns, int64_t depth, bool accumulate);

// A thread holds one from its first product to its last: AMX tiles must be configured before and released after. Does
// nothing if `used` is false.
class AmxTiles {
 public:
  explicit AmxTiles(bool used);
  ~AmxTiles();
  AmxTiles(const AmxTiles&) = delete;

 private:
  const bool held_;
};

}  // namespace autofocus
