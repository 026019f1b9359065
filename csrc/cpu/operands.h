// What blends and products read beside the voxels: attention, vectors and weight, packed.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "bfloat16_gemm.h"
#include "bfloat16_tiles.h"
#include "gemm.h"
#include "lattice.h"
#include "pack.h"
#include "scratch.h"
#include "tile.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

// Whether tensors of type T are multiplied in bfloat16. CPUs of the narrower instruction sets cannot.
template <typename T>
bool use_bfloat16() {
  if constexpr (std::is_same_v<T, BFloat16> && AUTOFOCUS_VECTOR_BYTES == 64) return has_bfloat16_gemm();
  return false;
}

// Matrices of `depth` rows, one after another, as products in bfloat16 take them; empty if those are not used.
template <typename T, typename A>
Scratch<uint16_t> round_matrices(const A* from, int64_t count, int64_t depth, int64_t columns, bool used) {
  Scratch<uint16_t> rounded(used ? count * bfloat16_depth(depth) * columns : 0);
  if constexpr (std::is_same_v<T, BFloat16>)
    for (int64_t i = 0; used && i < count; ++i)
      round_pairs(from + i * depth * columns, columns, depth, columns, rounded + i * bfloat16_depth(depth) * columns);
  return rounded;
}

// The attention of one tile: rows 0..K-1 the branches, row K their sum; rows are `width` apart.
template <typename T, typename A>
void pack_attention(const Lattice& lattice, const View<const T>& attention, const std::vector<Segment>& segments, A* to,
                    int64_t width) {
  const int64_t K = lattice.problem.K;
  for (const Segment& s : segments) {
    A* sum = to + K * width + s.offset;
    std::fill(sum, sum + s.count, A(0));
    for (int64_t k = 0; k < K; ++k) {
      A* row = to + k * width + s.offset;
      pack_row(lattice.output_row(attention, k, s.first()), s.count, 1, row, 1);
      for (int64_t p = 0; p < s.count; ++p) sum[p] += row[p];
    }
  }
}

// A vector [O] (zeros where null), filled up to whole vectors of the register.
template <typename A, typename T>
Scratch<A> pack_bias(const T* from, int64_t O) {
  Scratch<A> packed(padded<A>(O));
  pack_row(Row<const T>{from, 0, 1}, 1, from == nullptr ? 0 : O, packed.get(), padded<A>(O));
  return packed;
}

// A matrix [K, O] (or one value everywhere, where `from` is null) as [group][k][width]: groups of `width` outputs.
template <typename A, typename T>
Scratch<A> pack_vectors(const T* from, A otherwise, int64_t K, int64_t O, int64_t groups, int64_t width) {
  Scratch<A> packed(groups * K * width);
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t lane = 0; lane < width; ++lane) {
        const int64_t o = group * width + lane;
        packed[(group * K + k) * width + lane] = o >= O            ? A(0)
                                                 : from == nullptr ? otherwise
                                                                   : to_accumulator(from[k * O + o]);
      }
  return packed;
}

// The weight's element [o, c] at tap x of a row of taps.
template <typename T>
T* weight_at(const Problem& g, const View<T>& weight, int64_t o, int64_t c, int64_t tap_row, int64_t x) {
  return weight.row(o, c, {tap_row / g.kernel.y, tap_row % g.kernel.y, x}).data;
}

// The weight as the projection of a row of taps reads it, with the taps of the row side by side as columns:
// [group][tap row][row][tap x][width]. Rows are what is summed over, C of the forward and O of its transpose; columns
// are the other, in groups of `width`.
template <typename A, typename T>
Scratch<A> pack_tap_columns(const Problem& g, const View<const T>& weight, bool transpose, int64_t width) {
  const int64_t rows = transpose ? g.O : g.C, columns = transpose ? g.C : g.O;
  const int64_t column_step = transpose ? weight.c : weight.n;
  Scratch<A> packed(ceil_div(columns, width) * num_taps(g) * rows * width);
  A* to = packed;
  for (int64_t first = 0; first < columns; first += width)
    for (int64_t tap_row = 0; tap_row < g.kernel.z * g.kernel.y; ++tap_row)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t x = 0; x < g.kernel.x; ++x, to += width) {
          const T* from =
              transpose ? weight_at(g, weight, row, first, tap_row, x) : weight_at(g, weight, first, row, tap_row, x);
          pack_row(Row<const T>{from, 0, column_step}, 1, std::min(width, columns - first), to, width);
        }
  return packed;
}

// Calls visit(first column, columns) for the parts of a tap row's columns that hold channels: all of them at once, or
// tap by tap where whole vectors of the `width` hold none.
template <typename A, typename Visit>
void for_each_tap_columns(int64_t taps, int64_t width, int64_t channels, const Visit& visit) {
  if (gemm_columns_written<A>(channels) == width) return visit(0, taps * width);
  for (int64_t x = 0; x < taps; ++x) visit(x * width, channels);
}

// Columns that for_each_tap_columns leaves out are read all the same: they must be zeros, not what a tile left there.
template <typename A>
void clear_missing(A* columns, int64_t size, int64_t width, int64_t channels) {
  if (gemm_columns_written<A>(channels) < width) std::fill(columns, columns + size, A(0));
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
