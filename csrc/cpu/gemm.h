// C[m][n] (+)= sum_k A[m][k] B[k][n] for operands that sit in the L1/L2 cache: the "project" of every kernel.
//
// A is read one scalar at a time and may have any strides (a blended tile or its transpose); B and C have rows of whole
// vectors. Each register tile of MR x NR vectors is summed over all of k before it is written.
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

template <typename A, int MR, int NR, bool accumulate>
void gemm_tile(const GemmOperands<A>& op, int64_t row, int64_t column) {
  using V = Vec<A>;
  typename V::Native acc[MR][NR];
  const A* a = op.a + row * op.a_row;
  const A* b = op.b + column;
  A* c = op.c + row * op.c_row + column;
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n)
      acc[m][n] = accumulate ? V::load(c + m * op.c_row + n * V::kLanes) : typename V::Native{};
  for (int64_t k = 0; k < op.depth; ++k, a += op.a_k, b += op.b_k) {
    typename V::Native bk[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) bk[n] = V::load(b + n * V::kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const typename V::Native am = V::broadcast(a[m * op.a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) acc[m][n] += am * bk[n];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) V::store(c + m * op.c_row + n * V::kLanes, acc[m][n]);
}

template <typename A, int NR, bool accumulate>
struct GemmTiles {
  static constexpr int kMaxRows = Vec<A>::kAccumulators / NR > 14 ? 14 : Vec<A>::kAccumulators / NR;
  using Tile = void (*)(const GemmOperands<A>&, int64_t, int64_t);

  template <int... rows>
  static Tile pick(int64_t wanted, std::integer_sequence<int, rows...>) {
    static constexpr Tile tiles[] = {gemm_tile<A, rows + 1, NR, accumulate>...};
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

template <typename A, bool accumulate>
void gemm_columns(const GemmOperands<A>& op, int64_t rows, int64_t columns) {
  int64_t left = columns / Vec<A>::kLanes;
  int64_t column = 0;
  while (left > 0) {
    // Three vectors wide where possible, but 2 + 2 instead of 3 + 1.
    const int64_t width = left == 4 ? 2 : std::min<int64_t>(left, 3);
    if (width == 3) GemmTiles<A, 3, accumulate>::run(op, rows, column);
    if (width == 2) GemmTiles<A, 2, accumulate>::run(op, rows, column);
    if (width == 1) GemmTiles<A, 1, accumulate>::run(op, rows, column);
    column += width * Vec<A>::kLanes;
    left -= width;
  }
}

// `columns` is a multiple of the vector length.
template <typename A>
void gemm(const GemmOperands<A>& op, int64_t rows, int64_t columns, bool accumulate) {
  if (accumulate)
    gemm_columns<A, true>(op, rows, columns);
  else
    gemm_columns<A, false>(op, rows, columns);
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
