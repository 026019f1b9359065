#include "brgemm.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "amx.h"

namespace c10 {
struct BFloat16;
}  // namespace c10

namespace at::native::cpublas {
__attribute__((weak)) void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                                  const c10::BFloat16* A, const c10::BFloat16* B, float* C, bool vnni);
__attribute__((weak)) void brgemm_release(bool vnni);
}  // namespace at::native::cpublas

namespace autofocus {

namespace {

uint16_t small_bfloat16(int value) {
  const float number = float(value);
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return uint16_t(bits >> 16);
}

bool has_amx() {
  static const bool has = amx::available();
  return has;
}

// torch's product takes more kinds of CPU; AMX never comes without AVX512_BF16, with which tiles are rounded.
bool has_bfloat16() {
#if AUTOFOCUS_HAS_BFLOAT16
  using namespace at::native::cpublas;
  return __builtin_cpu_supports("avx512bf16") &&
         (has_amx() || (&at::native::cpublas::brgemm != nullptr && &brgemm_release != nullptr));
#else
  return false;
#endif
}

// Small integers are exact in bfloat16, and so are their products in float: the result must be equal.
bool self_check() {
  constexpr int64_t rows = 41, columns = 80, depth = 70, room_rows = 48, room_depth = 96;  // blocks of every kind
  std::vector<uint16_t> a(room_rows * room_depth), b(room_depth * columns);
  std::vector<float> c(room_rows * columns);
  const auto left = [](int64_t m, int64_t k) { return int((m * 5 + k * 3) % 13) - 6; };
  const auto right = [](int64_t k, int64_t n) { return int((k * 7 + n * 2) % 11) - 5; };
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < depth; ++k) a[m * room_depth + k] = small_bfloat16(left(m, k));
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t n = 0; n < columns; ++n) b[(k / 2 * columns + n) * 2 + k % 2] = small_bfloat16(right(k, n));
  {
    const BrgemmTiles tiles(true);
    for (const bool accumulate : {false, true})
      brgemm(a.data(), room_depth, b.data(), c.data(), columns, rows, columns, depth, accumulate);
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

bool brgemm_works() {
  static const bool works = [] {
    try {
      return has_bfloat16() && self_check();
    } catch (...) {
      return false;
    }
  }();
  return works;
}

const char* brgemm_instructions() { return has_amx() ? "AMX" : "AVX512_BF16"; }

int64_t brgemm_rows(int64_t rows) { return has_amx() ? round_up(rows, amx::kRows) : rows; }
int64_t brgemm_depth(int64_t depth) { return round_up(depth, has_amx() ? amx::kDepth : 2); }

void brgemm(const uint16_t* a, int64_t a_row, const uint16_t* b, float* c, int64_t c_row, int64_t rows, int64_t columns,
            int64_t depth, bool accumulate) {
  if (has_amx())
    return amx::product(a, a_row, b, c, c_row, brgemm_rows(rows), columns, brgemm_depth(depth), accumulate);
  // Blocks of 16, 32, 48 or 64 columns only: oneDNN's kernels for others are far slower.
  for (int64_t column = 0; column < columns; column += 64)
    at::native::cpublas::brgemm(rows, std::min<int64_t>(64, columns - column), brgemm_depth(depth), a_row, columns,
                                c_row, accumulate, reinterpret_cast<const c10::BFloat16*>(a),
                                reinterpret_cast<const c10::BFloat16*>(b + column * 2), c + column, true);
}

BrgemmTiles::BrgemmTiles(bool used) : used_(used) {
  if (used_ && has_amx()) amx::configure();
}

BrgemmTiles::~BrgemmTiles() {
  if (!used_) return;
  has_amx() ? amx::release() : at::native::cpublas::brgemm_release(true);
}

}  // namespace autofocus
