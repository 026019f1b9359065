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

// Whether products of bfloat16 are to be had, and right, on this CPU.
bool has_bfloat16_gemm();
// What they are made with there.
const char* bfloat16_instructions();

// Up to where operands and result have room, since products may be of whole tiles: the rows of a and c, whatever they
// hold beyond `rows`; and the depth of a and b, where both are zero beyond `depth`.
int64_t bfloat16_rows(int64_t rows);
int64_t bfloat16_depth(int64_t depth);

// c[m][n] (+)= sum_k a[m][k] b[k][n] with float c and b in pairs of k: [depth / 2][columns][2]. `columns` (also the row
// length of b) is a multiple of 16. Subnormal numbers count as zero, as in torch's own products.
void bfloat16_gemm(const uint16_t* a, int64_t a_row, const uint16_t* b, float* c, int64_t c_row, int64_t rows,
                   int64_t columns, int64_t depth, bool accumulate);

// What a thread holds from its first product to its last: AMX tiles are configured, and have state. Holds nothing if
// `used` is false.
class AmxTiles {
 public:
  explicit AmxTiles(bool used);
  ~AmxTiles();
  AmxTiles(const AmxTiles&) = delete;

 private:
  const bool held_;
};

}  // namespace autofocus
