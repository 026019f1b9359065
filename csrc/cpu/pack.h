// Moves rows of voxels between tensors of any strides and dtype and dense tiles [voxel][channel] of floats or doubles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "element.h"
#include "simd.h"
#include "view.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

// Transposes a block of kLanes vectors in registers: in round s, rows i and i + s swap their off-diagonal blocks.
template <typename A, int s, int... lane>
inline __attribute__((always_inline)) void swap_blocks(typename Vec<A>::Native& a, typename Vec<A>::Native& b,
                                                       std::integer_sequence<int, lane...>) {
  constexpr int n = Vec<A>::kLanes;
  const typename Vec<A>::Native low = __builtin_shufflevector(a, b, (lane & s ? n + lane - s : lane)...);
  const typename Vec<A>::Native high = __builtin_shufflevector(a, b, (lane & s ? n + lane : lane + s)...);
  a = low;
  b = high;
}

template <typename A, int s = Vec<A>::kLanes / 2>
inline __attribute__((always_inline)) void transpose(typename Vec<A>::Native* rows) {
  if constexpr (s > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < Vec<A>::kLanes; ++i)
      if ((i & s) == 0) swap_blocks<A, s>(rows[i], rows[i + s], std::make_integer_sequence<int, Vec<A>::kLanes>{});
    transpose<A, s / 2>(rows);
  }
}

// Elements 0, 2, 4 ... of a row: `a` holds its first kLanes, `b` those from kLanes - 1 on.
template <typename A, int... lane>
inline __attribute__((always_inline)) typename Vec<A>::Native every_other(typename Vec<A>::Native a,
                                                                          typename Vec<A>::Native b,
                                                                          std::integer_sequence<int, lane...>) {
  constexpr int n = Vec<A>::kLanes;
  return __builtin_shufflevector(a, b, (2 * lane < n ? 2 * lane : 2 * lane + 1)...);
}

// One vector of elements `step` apart. Only the first `count` exist; the others are zero.
template <typename T, typename A>
inline __attribute__((always_inline)) typename Vec<A>::Native load_strided(const T* from, int64_t step, int64_t count) {
  constexpr int64_t n = Vec<A>::kLanes;
  if constexpr (std::is_same_v<T, A>) {
    if (step == 1 && count == n) return Vec<A>::load(from);
    // Every other element: two loads that end with the last one wanted.
    if (step == 2 && count == n)
      return every_other<A>(Vec<A>::load(from), Vec<A>::load(from + n - 1), std::make_integer_sequence<int, n>{});
  }
  A lanes[n] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = to_accumulator(from[i * step]);
  return Vec<A>::load(lanes);
}

template <typename A, typename T>
inline __attribute__((always_inline)) void store_strided(typename Vec<A>::Native value, T* to, int64_t step,
                                                         int64_t count) {
  if constexpr (std::is_same_v<T, A>)
    if (step == 1 && count == Vec<A>::kLanes) return Vec<A>::store(to, value);
  A lanes[Vec<A>::kLanes];
  Vec<A>::store(lanes, value);
  for (int64_t i = 0; i < count; ++i) from_accumulator(lanes[i], to[i * step]);
}

// Copies the whole vectors of `count` neighbours, where nothing has to be converted; returns how many elements.
template <typename From, typename To>
inline __attribute__((always_inline)) int64_t whole_vectors(const From* from, int64_t count, To* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<From, To>)
    for (; i + Vec<To>::kLanes <= count; i += Vec<To>::kLanes) Vec<To>::store(to + i, Vec<To>::load(from + i));
  return i;
}

// `count` voxels of a tensor to rows of `width` channels; those past `channels` are zeroed, so that whole vectors can
// be read.
template <typename T, typename A>
void pack_row(const Row<const T>& row, int64_t count, int64_t channels, A* to, int64_t width) {
  constexpr int64_t n = Vec<A>::kLanes;
  const T* from = row.data;
  const int64_t x = row.x, c = row.c;
  if (c == 1) {
    for (int64_t i = 0; i < count; ++i, from += x, to += width) {
      int64_t j = whole_vectors(from, channels, to);
      for (; j < channels; ++j) to[j] = to_accumulator(from[j]);
      for (; j < width; ++j) to[j] = 0;
    }
    return;
  }
  if (count == 1 || width % n != 0) {
    for (int64_t i = 0; i < count; ++i, from += x, to += width) {
      for (int64_t j = 0; j < channels; ++j) to[j] = to_accumulator(from[j * c]);
      for (int64_t j = channels; j < width; ++j) to[j] = 0;
    }
    return;
  }
  for (int64_t j = 0; j < width; j += n)
    for (int64_t i = 0; i < count; i += n) {
      typename Vec<A>::Native rows[n];
      const int64_t voxels = std::min(n, count - i);
      for (int64_t lane = 0; lane < n; ++lane)
        rows[lane] = j + lane < channels ? load_strided<T, A>(from + i * x + (j + lane) * c, x, voxels)
                                         : typename Vec<A>::Native{};
      transpose<A>(rows);
      for (int64_t lane = 0; lane < voxels; ++lane) Vec<A>::store(to + (i + lane) * width + j, rows[lane]);
    }
}

// The way back. Rows of `from` hold whole vectors.
template <typename A, typename T>
void unpack_row(const A* from, int64_t width, int64_t count, int64_t channels, const Row<T>& row) {
  constexpr int64_t n = Vec<A>::kLanes;
  T* to = row.data;
  const int64_t x = row.x, c = row.c;
  if (c == 1) {
    for (int64_t i = 0; i < count; ++i, from += width, to += x) {
      int64_t j = whole_vectors(from, channels, to);
      for (; j < channels; ++j) from_accumulator(from[j], to[j]);
    }
    return;
  }
  for (int64_t j = 0; j < channels; j += n)
    for (int64_t i = 0; i < count; i += n) {
      typename Vec<A>::Native rows[n];
      const int64_t voxels = std::min(n, count - i);
      for (int64_t lane = 0; lane < n; ++lane)
        rows[lane] = lane < voxels ? Vec<A>::load(from + (i + lane) * width + j) : typename Vec<A>::Native{};
      transpose<A>(rows);
      for (int64_t lane = 0; lane < std::min(n, channels - j); ++lane)
        store_strided<A>(rows[lane], to + i * x + (j + lane) * c, x, voxels);
    }
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
