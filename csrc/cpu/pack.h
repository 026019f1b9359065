// Moves rows of voxels between tensors of any strides and dtype and dense tiles [voxel][channel] of floats or doubles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "lattice.h"
#include "simd.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

inline uint32_t float_bits(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }
inline float bits_float(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }

inline float to_accumulator(float value) { return value; }
inline double to_accumulator(double value) { return value; }
inline float to_accumulator(BFloat16 value) { return bits_float(uint32_t(value.bits) << 16); }
inline float to_accumulator(Half value) {
  // Shift exponent and mantissa into place and rescale; numbers with the largest exponent are Inf or NaN.
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t rest = uint32_t(value.bits & 0x7fffu) << 13;
  const float scaled = bits_float(rest) * bits_float(0x77800000u);  // 2^112
  const uint32_t special = rest >= 0x0f800000u ? 0x7f800000u : 0u;
  return bits_float(sign | float_bits(scaled) | special);
}

inline void from_accumulator(float value, float& to) { to = value; }
inline void from_accumulator(double value, double& to) { to = value; }
inline void from_accumulator(float value, BFloat16& to) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  to.bits = uint16_t(value != value ? 0x7fc0u : rounded);
}
inline void from_accumulator(float value, Half& to) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: let the addition of 0.5 do the rounding
    result = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  to.bits = uint16_t(sign | result);
}

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

// Elements 0, 2, 4 ... of a row of which `a` holds the first kLanes and `b` those from kLanes - 1 on.
template <typename A, int... lane>
inline __attribute__((always_inline)) typename Vec<A>::Native every_other(typename Vec<A>::Native a,
                                                                          typename Vec<A>::Native b,
                                                                          std::integer_sequence<int, lane...>) {
  constexpr int n = Vec<A>::kLanes;
  return __builtin_shufflevector(a, b, (2 * lane < n ? 2 * lane : 2 * lane + 1)...);
}

// One vector of elements `step` apart, of which the first `count` exist.
template <typename T, typename A>
inline __attribute__((always_inline)) typename Vec<A>::Native gather(const T* from, int64_t step, int64_t count) {
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
inline __attribute__((always_inline)) void scatter(typename Vec<A>::Native value, T* to, int64_t step, int64_t count) {
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

// `count` voxels from `from` (voxel distance x, channel distance c) to rows of `width` channels; those past `channels`
// are zeroed, so that whole vectors can be read.
template <typename T, typename A>
void pack_row(const T* from, int64_t x, int64_t c, int64_t count, int64_t channels, A* to, int64_t width) {
  constexpr int64_t n = Vec<A>::kLanes;
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
        rows[lane] = j + lane < channels ? gather<T, A>(from + i * x + (j + lane) * c, x, voxels)
                                         : typename Vec<A>::Native{};
      transpose<A>(rows);
      for (int64_t lane = 0; lane < voxels; ++lane) Vec<A>::store(to + (i + lane) * width + j, rows[lane]);
    }
}

// The way back. Rows of `from` hold whole vectors.
template <typename A, typename T>
void unpack_row(const A* from, int64_t width, int64_t count, int64_t channels, T* to, int64_t x, int64_t c) {
  constexpr int64_t n = Vec<A>::kLanes;
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
        scatter<A>(rows[lane], to + i * x + (j + lane) * c, x, voxels);
    }
}

// The element at lattice position (z, y, x) of a tensor, for lattice position 0 at `first`.
template <typename T>
T* lattice_row(const View<T>& view, int64_t n, int64_t channel, const Index3& first, const Index3& step, int64_t z,
               int64_t y, int64_t x) {
  return view.data + n * view.n + channel * view.c + (first.z + step.z * z) * view.s.z +
         (first.y + step.y * y) * view.s.y + (first.x + step.x * x) * view.s.x;
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
