#include "bfloat16_tiles.h"

#include <algorithm>

#include "bfloat16_gemm.h"

#if AUTOFOCUS_HAS_BFLOAT16
#include <immintrin.h>

#define AUTOFOCUS_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace autofocus {

namespace {

// The lowest `count` of 16 or 32.
AUTOFOCUS_TARGET __mmask16 first_of_16(int64_t count) {
  return __mmask16((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
}
AUTOFOCUS_TARGET __mmask32 first_of_32(int64_t count) { return __mmask32((1ull << std::min<int64_t>(count, 32)) - 1); }

// `low` in elements 0 to 15, `high` in those behind them.
AUTOFOCUS_TARGET __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Of 16 columns of two rows, the numbers of a column side by side; zeros for the second row if `rows` is 1.
AUTOFOCUS_TARGET __m512i rounded_pairs(const float* from, int64_t from_row, int64_t rows) {
  const __m512i in_turn =
      _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008, 0x170007,
                       0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
  const __m512 second = rows > 1 ? _mm512_loadu_ps(from + from_row) : _mm512_setzero_ps();
  return _mm512_permutexvar_epi16(in_turn, rounded(_mm512_loadu_ps(from), second));
}

}  // namespace

AUTOFOCUS_TARGET void round_rows(const float* from, int64_t from_row, int64_t rows, int64_t depth, uint16_t* to,
                                 int64_t to_row) {
  const int64_t whole = depth / 32 * 32;
  const __mmask16 low = first_of_16(depth - whole), high = first_of_16(depth - whole - 16);
  const __mmask32 stored = first_of_32(bfloat16_depth(depth) - whole);
  for (int64_t row = 0; row < rows; ++row, from += from_row, to += to_row) {
    for (int64_t k = 0; k < whole; k += 32)
      _mm512_storeu_si512(to + k, rounded(_mm512_loadu_ps(from + k), _mm512_loadu_ps(from + k + 16)));
    if (whole < depth)
      _mm512_mask_storeu_epi16(
          to + whole, stored,
          rounded(_mm512_maskz_loadu_ps(low, from + whole), _mm512_maskz_loadu_ps(high, from + whole + 16)));
  }
}

AUTOFOCUS_TARGET void round_pairs(const float* from, int64_t from_row, int64_t depth, int64_t columns, uint16_t* to) {
  const int64_t whole = bfloat16_depth(depth);
  for (int64_t k = 0; k < depth; k += 2, from += 2 * from_row, to += 2 * columns)
    for (int64_t column = 0; column < columns; column += 16)
      _mm512_storeu_si512(to + 2 * column, rounded_pairs(from + column, from_row, depth - k));
  std::fill(to, to + (whole - depth) / 2 * 2 * columns, uint16_t(0));
}

AUTOFOCUS_TARGET void round_transposed(const float* from, int64_t from_row, int64_t depth, int64_t columns,
                                       uint16_t* to, int64_t to_row) {
  const int64_t whole = bfloat16_depth(depth);
  const __m512i rows = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                          _mm512_set1_epi32(int(to_row)));
  for (int64_t column = 0; column < columns; column += 16, to += 16 * to_row) {
    const __mmask16 there = first_of_16(columns - column);
    for (int64_t k = 0; k < whole; k += 2) {
      const __m512i pairs =
          k < depth ? rounded_pairs(from + k * from_row + column, from_row, depth - k) : _mm512_setzero_si512();
      _mm512_mask_i32scatter_epi32(to + k, there, rows, pairs, sizeof(uint16_t));
    }
  }
}

}  // namespace autofocus

#else

namespace autofocus {

// Never called: has_bfloat16_gemm() is false.
void round_rows(const float*, int64_t, int64_t, int64_t, uint16_t*, int64_t) {}
void round_pairs(const float*, int64_t, int64_t, int64_t, uint16_t*) {}
void round_transposed(const float*, int64_t, int64_t, int64_t, uint16_t*, int64_t) {}

}  // namespace autofocus

#endif
