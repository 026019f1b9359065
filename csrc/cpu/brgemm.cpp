#include "brgemm.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace c10 {
struct BFloat16;
enum class ScalarType : int8_t;
}  // namespace c10

namespace at::native::cpublas {
__attribute__((weak)) void brgemm(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                                  const c10::BFloat16* A, const c10::BFloat16* B, float* C, bool vnni);
__attribute__((weak)) void brgemm_release(bool vnni);
__attribute__((weak)) bool could_pack(c10::ScalarType dtype);
}  // namespace at::native::cpublas

namespace autofocus {

namespace {

uint16_t small_bfloat16(int value) {
  const float number = float(value);
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return uint16_t(bits >> 16);
}

bool cpu_multiplies_bfloat16() {
#if defined(__x86_64__)
  constexpr int8_t kBFloat16 = 15;  // c10::ScalarType::BFloat16, part of torch's serialised formats
  return __builtin_cpu_supports("avx512bf16") || at::native::cpublas::could_pack(c10::ScalarType(kBFloat16));
#else
  return false;
#endif
}

// Small integers are exact in bfloat16, and so are their products in float: the result must be equal.
bool self_check() {
  constexpr int64_t rows = 17, columns = 80, depth = 34;
  uint16_t a[rows * depth], b[depth * columns];
  float c[rows * columns], expected[rows * columns];
  const auto left = [](int64_t m, int64_t k) { return int((m * 5 + k * 3) % 13) - 6; };
  const auto right = [](int64_t k, int64_t n) { return int((k * 7 + n * 2) % 11) - 5; };
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < depth; ++k) a[m * depth + k] = small_bfloat16(left(m, k));
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t n = 0; n < columns; ++n) b[(k / 2 * columns + n) * 2 + k % 2] = small_bfloat16(right(k, n));
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < columns; ++n) {
      int sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += left(m, k) * right(k, n);
      expected[m * columns + n] = 2 * float(sum);
    }
  brgemm(a, depth, b, c, columns, rows, columns, depth, false);
  brgemm(a, depth, b, c, columns, rows, columns, depth, true);
  brgemm_done();
  return std::equal(c, c + rows * columns, expected);
}

}  // namespace

bool brgemm_works() {
  static const bool works = [] {
    using namespace at::native::cpublas;
    if (&at::native::cpublas::brgemm == nullptr || &brgemm_release == nullptr || &could_pack == nullptr) return false;
    try {
      return cpu_multiplies_bfloat16() && self_check();
    } catch (...) {
      return false;
    }
  }();
  return works;
}

void brgemm(const uint16_t* a, int64_t a_row, const uint16_t* b, float* c, int64_t c_row, int64_t rows, int64_t columns,
            int64_t depth, bool accumulate) {
  // Blocks of 16, 32, 48 or 64 columns only: oneDNN's kernels for others are far slower.
  for (int64_t column = 0; column < columns; column += 64)
    at::native::cpublas::brgemm(rows, std::min<int64_t>(64, columns - column), depth, a_row, columns, c_row, accumulate,
                                reinterpret_cast<const c10::BFloat16*>(a),
                                reinterpret_cast<const c10::BFloat16*>(b + column * 2), c + column, true);
}

void brgemm_done() { at::native::cpublas::brgemm_release(true); }

}  // namespace autofocus
