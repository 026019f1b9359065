// Products of bfloat16 by AVX512_BF16: one instruction adds two products to each of 16 sums.
//
// Tiles of registers as in gemm.h. A pair of neighbours in a row of `a` meets pairs of neighbours in columns of `b`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "bfloat16_gemm.h"

#if AUTOFOCUS_HAS_BFLOAT16
#include <immintrin.h>
#endif

namespace autofocus {
namespace avx512_bf16 {

#if AUTOFOCUS_HAS_BFLOAT16

inline bool available() { return __builtin_cpu_supports("avx512bf16"); }

// R rows of C vectors of the result. Steps are in elements of their arrays.
template <int R, int C>
inline __attribute__((target("avx512f,avx512bf16"))) void block(const uint16_t* a, int64_t a_row, const uint16_t* b,
                                                                int64_t b_row, float* c, int64_t c_row, int64_t depth,
                                                                bool accumulate) {
  __m512 sums[R][C];
#pragma GCC unroll 16
  for (int row = 0; row < R; ++row)
#pragma GCC unroll 4
    for (int column = 0; column < C; ++column) sums[row][column] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += 2, a += 2, b += b_row) {
    __m512i of_b[C];
#pragma GCC unroll 4
    for (int column = 0; column < C; ++column) of_b[column] = _mm512_loadu_si512(b + 32 * column);
#pragma GCC unroll 16
    for (int row = 0; row < R; ++row) {
      int pair;
      std::memcpy(&pair, a + row * a_row, sizeof(pair));
      const __m512i of_a = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int column = 0; column < C; ++column)
        sums[row][column] = _mm512_dpbf16_ps(sums[row][column], (__m512bh)of_a, (__m512bh)of_b[column]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < R; ++row)
#pragma GCC unroll 4
    for (int column = 0; column < C; ++column) {
      float* to = c + row * c_row + 16 * column;
      const __m512 sum = sums[row][column];
      _mm512_storeu_ps(to, accumulate ? _mm512_add_ps(_mm512_loadu_ps(to), sum) : sum);
    }
}

template <int C, int... less>
inline auto pick_block(int64_t rows, std::integer_sequence<int, less...>) {
  static constexpr decltype(&block<1, C>) blocks[] = {block<less + 1, C>...};
  return blocks[rows - 1];
}

// All rows of C vectors of columns, split evenly so that no block is a thin remainder.
template <int C>
inline void strip(const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t b_row, float* c, int64_t c_row,
                  int64_t rows, int64_t depth, bool accumulate) {
  constexpr int kMaxRows = std::min(14, 28 / C);
  const int64_t blocks = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t block = 0, row = 0; block < blocks; ++block) {
    const int64_t height = (rows - row + (blocks - block) - 1) / (blocks - block);
    pick_block<C>(height, std::make_integer_sequence<int, kMaxRows>{})(a + row * a_row, a_row, b, b_row,
                                                                       c + row * c_row, c_row, depth, accumulate);
    row += height;
  }
}

// c (+)= a b, b in pairs along the depth: [depth / 2][columns][2]. `columns` is a multiple of 16, the depth of 2.
inline void product(const uint16_t* a, int64_t a_row, const uint16_t* b, float* c, int64_t c_row, int64_t rows,
                    int64_t columns, int64_t depth, bool accumulate) {
  for (int64_t column = 0, width; column < columns; column += width) {
    const int64_t left = columns - column;
    width = left == 64 ? 32 : std::min<int64_t>(left, 48);  // 2 + 2 vectors instead of 3 + 1
    const auto multiply = width == 48 ? strip<3> : width == 32 ? strip<2> : strip<1>;
    multiply(a, a_row, b + 2 * column, 2 * columns, c + column, c_row, rows, depth, accumulate);
  }
}

#else

inline bool available() { return false; }
inline void product(const uint16_t*, int64_t, const uint16_t*, float*, int64_t, int64_t, int64_t, int64_t, bool) {}

#endif

}  // namespace avx512_bf16
}  // namespace autofocus
