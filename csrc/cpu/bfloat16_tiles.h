// Tiles of bfloat16 in the layouts of brgemm.h.
#pragma once

#include "brgemm.h"
#include "pack.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

inline uint16_t round_to_bfloat16(float value) {
  BFloat16 rounded;
  from_accumulator(value, rounded);
  return rounded.bits;
}

inline int64_t even(int64_t count) { return count + count % 2; }

// Whether tensors of type T are multiplied in bfloat16. Narrower instruction sets are there for CPUs without.
template <typename T>
bool use_brgemm() {
  if constexpr (std::is_same_v<T, BFloat16> && AUTOFOCUS_VECTOR_BYTES == 64) return brgemm_works();
  return false;
}

// to[row][k] = from[row][k], an odd depth filled up by zeros.
inline void round_rows(const float* from, int64_t from_row, int64_t rows, int64_t depth, uint16_t* to, int64_t to_row) {
  for (int64_t row = 0; row < rows; ++row, from += from_row, to += to_row) {
    for (int64_t k = 0; k < depth; ++k) to[k] = round_to_bfloat16(from[k]);
    if (depth % 2 != 0) to[depth] = 0;
  }
}

// to[k / 2][column][k % 2] = from[k][column], an odd depth filled up by zeros.
inline void round_pairs(const float* from, int64_t from_row, int64_t depth, int64_t columns, uint16_t* to) {
  for (int64_t k = 0; k < depth; k += 2, from += 2 * from_row, to += 2 * columns)
    for (int64_t column = 0; column < columns; ++column) {
      to[2 * column] = round_to_bfloat16(from[column]);
      to[2 * column + 1] = k + 1 < depth ? round_to_bfloat16(from[from_row + column]) : 0;
    }
}

// to[column][k] = from[k][column] for `columns` columns.
inline void round_transposed(const float* from, int64_t from_row, int64_t depth, int64_t columns, uint16_t* to,
                             int64_t to_row) {
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t k = 0; k < depth; ++k) to[column * to_row + k] = round_to_bfloat16(from[k * from_row + column]);
    if (depth % 2 != 0) to[column * to_row + depth] = 0;
  }
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
