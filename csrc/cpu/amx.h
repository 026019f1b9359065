// Products of bfloat16 on AMX: a thread has eight tiles of 16 rows of 64 bytes.
//
// All tiles are whole, so that one configuration, loaded once by a thread, serves all products: to load one for each
// shape takes longer than a product as small as those here. Operands are rounded up to whole tiles.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bfloat16_gemm.h"

#if AUTOFOCUS_HAS_BFLOAT16 && defined(__linux__)
#define AUTOFOCUS_HAS_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace autofocus {
namespace amx {

constexpr int64_t kRows = 16;   // of operand a and of the result in a tile
constexpr int64_t kDepth = 32;  // summed over by one instruction

#if AUTOFOCUS_HAS_AMX

// Whether the CPU has the instructions, and Linux lets this process use the tiles.
inline bool available() {
  constexpr unsigned kTile = 1u << 24, kBFloat16 = 1u << 22;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kBFloat16) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// GCC does not know which memory these instructions read and write.
inline void compiler_barrier() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline __attribute__((target("amx-tile"))) void configure() {
  static constexpr Configuration configuration;
  compiler_barrier();
  _tile_loadconfig(&configuration);
}

inline __attribute__((target("amx-tile"))) void release() { _tile_release(); }

// R x C tiles of the result at once. Steps are in elements of their arrays.
template <int R, int C>
inline __attribute__((target("amx-tile,amx-bf16"))) void block(const uint16_t* a, int64_t a_row, const uint16_t* b,
                                                               int64_t b_row, float* c, int64_t c_row, int64_t depth,
                                                               bool accumulate) {
  const int64_t a_bytes = 2 * a_row, b_bytes = 2 * b_row, c_bytes = 4 * c_row;
  float* const lower = c + kRows * c_row;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if (C == 2) _tile_loadd(1, c + 16, c_bytes);
    if (R == 2) _tile_loadd(2, lower, c_bytes);
    if (R == 2 && C == 2) _tile_loadd(3, lower + 16, c_bytes);
  } else {
    _tile_zero(0);
    if (C == 2) _tile_zero(1);
    if (R == 2) _tile_zero(2);
    if (R == 2 && C == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kDepth, a += kDepth, b += kDepth / 2 * b_row) {
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(4, a, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (R == 2) {
      _tile_loadd(5, a + kRows * a_row, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (C == 2) {
      _tile_loadd(7, b + 32, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
      if (R == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (C == 2) _tile_stored(1, c + 16, c_bytes);
  if (R == 2) _tile_stored(2, lower, c_bytes);
  if (R == 2 && C == 2) _tile_stored(3, lower + 16, c_bytes);
}

// c (+)= a b, b in pairs along the depth: [depth / 2][columns][2]. Whole tiles: rows and columns are multiples of 16,
// the depth of 32.
inline void product(const uint16_t* a, int64_t a_row, const uint16_t* b, float* c, int64_t c_row, int64_t rows,
                    int64_t columns, int64_t depth, bool accumulate) {
  const int64_t b_row = 2 * columns;
  compiler_barrier();
  for (int64_t column = 0; column < columns; column += 32)
    for (int64_t row = 0; row < rows; row += 2 * kRows) {
      const bool tall = rows - row > kRows, wide = columns - column > 16;
      const auto multiply = tall ? wide ? block<2, 2> : block<2, 1> : wide ? block<1, 2> : block<1, 1>;
      multiply(a + row * a_row, a_row, b + 2 * column, b_row, c + row * c_row + column, c_row, depth, accumulate);
    }
  compiler_barrier();
}

#else

inline bool available() { return false; }
inline void configure() {}
inline void release() {}
inline void product(const uint16_t*, int64_t, const uint16_t*, float*, int64_t, int64_t, int64_t, int64_t, bool) {}

#endif

}  // namespace amx
}  // namespace autofocus
