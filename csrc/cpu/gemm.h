// C[m][n] (+)= sum_k A[m][k] B[k][n] for operands that sit in the L1/L2 cache: the "project" of every kernel.
//
// A is read one scalar at a time and may have any strides (a blended tile or its transpose); B and C have rows of whole
// vectors. Each register tile of MR x NR vectors is summed over all of k before it is written, or added to C: a long
// sum, as that of the weight's gradient, is a sum of sums, and rounded as often as there are of them. With AVX-512 the
// last vector may be half a one, which saves a step on CPUs that run 512 bits in two.
#pragma once

#include <algorithm>
#include <utility>

#include "simd.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

template <typename A>
struct GemmOperands {
  const A* a;
  int64_t a_row, a_k;  // strides of A
  const A* b;
  int64_t b_k;
  A* c;
  int64_t c_row;
  int64_t depth;  // number of terms in the sum
};

// MR rows by NR vectors, and half a vector more if `half`.
template <typename A, int MR, int NR, bool half, bool accumulate>
void gemm_tile(const GemmOperands<A>& op, int64_t row, int64_t column) {
  using V = Vec<A>;
  typename V::Native acc[MR][NR > 0 ? NR : 1];
  typename V::HalfNative acc_half[MR];
  const A* a = op.a + row * op.a_row;
  const A* b = op.b + column;
  A* c = op.c + row * op.c_row + column;
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) acc[m][n] = typename V::Native{};
    if (half) acc_half[m] = typename V::HalfNative{};
  }
  for (int64_t k = 0; k < op.depth; ++k, a += op.a_k, b += op.b_k) {
    typename V::Native bk[NR > 0 ? NR : 1];
    typename V::HalfNative bk_half;
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) bk[n] = V::load(b + n * V::kLanes);
    if (half) bk_half = V::load_half(b + NR * V::kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const typename V::Native am = V::broadcast(a[m * op.a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) acc[m][n] += am * bk[n];
      if (half) acc_half[m] += V::lower(am) * bk_half;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) {
      A* to = c + m * op.c_row + n * V::kLanes;
      V::store(to, accumulate ? V::load(to) + acc[m][n] : acc[m][n]);
    }
    if (half) {
      A* to = c + m * op.c_row + NR * V::kLanes;
      V::store_half(to, accumulate ? V::load_half(to) + acc_half[m] : acc_half[m]);
    }
  }
}

template <typename A, int NR, bool half, bool accumulate>
struct GemmTiles {
  static constexpr int kMaxRows = std::min(14, Vec<A>::kAccumulators / (NR + half));
  using Tile = void (*)(const GemmOperands<A>&, int64_t, int64_t);

  template <int... rows>
  static Tile pick(int64_t wanted, std::integer_sequence<int, rows...>) {
    static constexpr Tile tiles[] = {gemm_tile<A, rows + 1, NR, half, accumulate>...};
    return tiles[wanted - 1];
  }

  // One column of register tiles, the rows split evenly so that no tile is a thin remainder.
  static void run(const GemmOperands<A>& op, int64_t rows, int64_t column) {
    const int64_t blocks = (rows + kMaxRows - 1) / kMaxRows;
    int64_t row = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t height = (rows - row + (blocks - block) - 1) / (blocks - block);
      pick(height, std::make_integer_sequence<int, kMaxRows>{})(op, row, column);
      row += height;
    }
  }
};

constexpr bool kHalfVectors = AUTOFOCUS_VECTOR_BYTES == 64;

// `columns` rounded up to whole vectors, or half ones where they are used.
template <typename A>
constexpr int64_t gemm_columns_written(int64_t columns) {
  constexpr int64_t unit = kHalfVectors ? Vec<A>::kLanes / 2 : Vec<A>::kLanes;
  return (columns + unit - 1) / unit * unit;
}

template <typename A, bool accumulate>
void gemm_columns(const GemmOperands<A>& op, int64_t rows, int64_t columns) {
  constexpr int64_t lanes = Vec<A>::kLanes;
  int64_t left = gemm_columns_written<A>(columns);
  int64_t column = 0;
  while (left > 0) {
    // Up to three vectors at a time, but 2 + 2 instead of 3 + 1, and 2 + 1.5 instead of 3 + 0.5.
    const int64_t width = left > 3 * lanes && left <= 4 * lanes ? 2 * lanes : std::min(left, 3 * lanes);
    if constexpr (kHalfVectors) {
      if (width == 5 * lanes / 2) GemmTiles<A, 2, true, accumulate>::run(op, rows, column);
      if (width == 3 * lanes / 2) GemmTiles<A, 1, true, accumulate>::run(op, rows, column);
      if (width == lanes / 2) GemmTiles<A, 0, true, accumulate>::run(op, rows, column);
    }
    if (width == 3 * lanes) GemmTiles<A, 3, false, accumulate>::run(op, rows, column);
    if (width == 2 * lanes) GemmTiles<A, 2, false, accumulate>::run(op, rows, column);
    if (width == lanes) GemmTiles<A, 1, false, accumulate>::run(op, rows, column);
    column += width;
    left -= width;
  }
}

// Writes gemm_columns_written(columns) of each row of C.
template <typename A>
void gemm(const GemmOperands<A>& op, int64_t rows, int64_t columns, bool accumulate) {
  if (accumulate)
    gemm_columns<A, true>(op, rows, columns);
  else
    gemm_columns<A, false>(op, rows, columns);
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
