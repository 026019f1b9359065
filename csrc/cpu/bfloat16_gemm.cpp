#include "bfloat16_gemm.h"

#include <cstring>
#include <vector>

#include "amx.h"
#include "avx512_bf16.h"

namespace autofocus {

namespace {

uint16_t small_bfloat16(int value) {
  const float number = float(value);
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return uint16_t(bits >> 16);
}

// Small integers are exact in bfloat16, and so are their products in float: the result must be equal.
bool is_right(int64_t columns) {
  constexpr int64_t rows = 41, depth = 70, room_rows = 48, room_depth = 96;
  std::vector<uint16_t> a(room_rows * room_depth), b(room_depth * columns);
  std::vector<float> c(room_rows * columns);
  const auto left = [](int64_t m, int64_t k) { return int((m * 5 + k * 3) % 13) - 6; };
  const auto right = [](int64_t k, int64_t n) { return int((k * 7 + n * 2) % 11) - 5; };
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < depth; ++k) a[m * room_depth + k] = small_bfloat16(left(m, k));
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t n = 0; n < columns; ++n) b[(k / 2 * columns + n) * 2 + k % 2] = small_bfloat16(right(k, n));
  {
    const AmxTiles tiles(true);
    for (const bool accumulate : {false, true})
      bfloat16_gemm(a.data(), room_depth, b.data(), c.data(), columns, rows, columns, depth, accumulate);
  }
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < columns; ++n) {
      int sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += left(m, k) * right(k, n);
      if (c[m * columns + n] != 2 * float(sum)) return false;
    }
  return true;
}

int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

}  // namespace

bool has_bfloat16_gemm() {
  static const bool works = [] {
    try {
      // Blocks of every width. AMX never comes without AVX512_BF16, by which tiles are rounded.
      return avx512_bf16::available() && is_right(16) && is_right(80);
    } catch (...) {
      return false;
    }
  }();
  return works;
}

bool has_amx() {
  static const bool has = amx::available();
  return has;
}

int64_t bfloat16_rows(int64_t rows) { return has_amx() ? round_up(rows, amx::kRows) : rows; }
int64_t bfloat16_depth(int64_t depth) { return round_up(depth, has_amx() ? amx::kDepth : 2); }

void bfloat16_gemm(const uint16_t* a, int64_t a_row, const uint16_t* b, float* c, int64_t c_row, int64_t rows,
                   int64_t columns, int64_t depth, bool accumulate) {
  if (has_amx())
    return amx::product(a, a_row, b, c, c_row, bfloat16_rows(rows), columns, bfloat16_depth(depth), accumulate);
  avx512_bf16::product(a, a_row, b, c, c_row, rows, columns, bfloat16_depth(depth), accumulate);
}

AmxTiles::AmxTiles(bool used) : held_(used && has_amx()) {
  if (held_) amx::configure();
}

AmxTiles::~AmxTiles() {
  if (held_) amx::release();
}

}  // namespace autofocus
