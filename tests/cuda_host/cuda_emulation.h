// The names of csrc/cuda/device.h on a CPU, which includes this file when nvcc does not compile it. The threads of a
// block are fibers. They run one at a time, each up to the next barrier or warp instruction, in an order that the test
// chooses. This cannot show speed, registers or real memory ordering.
//
// It is strict, so that a kernel that is right here has little room to be wrong:
//   * shared memory begins as NaN in every block, with guard bytes behind it;
//   * asynchronous work is done either at once or as late as allowed, and tests compare both. Late copies land when a
//     thread waits for them, late bulk copies when no thread can go on without them. Late warpgroup MMA reads operands
//     and writes sums when it is waited for.
// These are errors:
//   * a barrier that not every thread reaches, or a warp instruction that not every lane reaches;
//   * warpgroup MMA while a thread has not fenced what it copied;
//   * a bulk copy whose barrier is not fenced, or to where a thread has read by load_matrices without a fence since;
//   * a barrier that expects other bytes than come, and a block that ends before its bulk copies have landed;
//   * an access to memory that is not aligned to its type, which an x86 would do (-fsanitize=alignment);
//   * a write behind the scratch memory of a call.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned int x, y, z;
  dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;
void __syncthreads();

namespace autofocus::cuda {

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

namespace emulation {

// Counts a launch. Returns whether another runner (autofocus_emulation_run_by) has run it. `parameters` are the
// addresses of the kernel's parameters, `sizes` their bytes.
bool run_elsewhere(const char* name, const void* kernel, dim3 grid, int threads, int shared_bytes,
                   const std::vector<const void*>& parameters, const std::vector<size_t>& sizes);
void run_blocks(const char* name, dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel);
unsigned char* shared_memory();
void copy_async(unsigned char* to, const void* from, int bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);
void fence_proxies();
void init_barrier(uint64_t& barrier);
void expect_bytes(uint64_t& barrier, int bytes);
void arrive(uint64_t& barrier);
void end_barrier(uint64_t& barrier);
void wait_for_copies(uint64_t& barrier, uint32_t phase);
void copy_bulk(unsigned char* to, const void* from, int bytes, uint64_t& barrier);
void note_read(uint32_t row);  // this thread reads the row-th 16 bytes of shared memory

// The scratch memory of a call, with kScratchGuard bytes of kPoison behind it: what is written there is an error of the
// launch. Null: none.
constexpr int64_t kScratchGuard = 65536;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point format
void guard_scratch(const void* memory, int64_t bytes);

// The sum of a tensor core, which cuts off instead of rounding (docs/cuda.md, grad_weight).
inline float cut_sum(float sum, float products) {
  const double exact = double(sum) + products;
  const float rounded = float(exact);
  return std::abs(rounded) > std::abs(exact) && !std::isinf(rounded) ? std::nextafter(rounded, 0.0f) : rounded;
}

// How 16 bytes of an operand, the row of a block, are read as elements.
struct Elements {
  int count;
  void (*decode)(const unsigned char* row, float* elements);
};
// Warpgroup MMA, called by every lane. `d` are the lane's sums (tiles x 4) of its warp's 16 rows of the 64. Operand a
// is the descriptor `left` or, if `rows` is not null, an MMA fragment of the warp's rows. If copies are late, the
// product is computed by the warpgroup_wait that waits for it.
void warpgroup_mma(float* d, int tiles, const uint32_t* rows, uint64_t left, uint64_t right, bool over_points,
                   bool adds, const Elements& elements);
void warpgroup_commit();
void warpgroup_wait(int pending);

// Waits until all 32 lanes are here, then calls function(lanes) once, with the `operands` of every lane.
using WarpFunction = void (*)(void* const* lanes);
void warp_instruction(WarpFunction function, void* operands);

// Conversions to 16 bits round to nearest even, as on a GPU; NaN stays NaN.
extern const std::vector<float> half_values;  // by their bits
inline float half_to_float(uint16_t bits) { return half_values[bits]; }
uint16_t float_to_half(float value);
inline float bfloat16_to_float(uint16_t bits) { return float_of(uint32_t(bits) << 16); }
uint16_t float_to_bfloat16(float value);
void report_unrounded();
// An operand in TF32. The GPU drops its last 13 bits, so it is an error if any of them is set.
inline float tf32_to_float(uint32_t bits) {
  const float value = float_of(bits);
  // NaN may be memory that nothing wrote. Reading that is allowed where nobody reads the resulting sums.
  if ((bits & 0x1fff) != 0 && value == value) report_unrounded();
  return value;
}

}  // namespace emulation

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(Half value) { return emulation::half_to_float(value.bits); }
inline float to_float(BFloat16 value) { return emulation::bfloat16_to_float(value.bits); }
inline void from_float(Half& to, float value) { to.bits = emulation::float_to_half(value); }
inline void from_float(BFloat16& to, float value) { to.bits = emulation::float_to_bfloat16(value); }

inline uint32_t tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}

inline unsigned char* shared_memory() { return emulation::shared_memory(); }
template <int kBytes>
void copy_async(unsigned char* to, const void* from, bool valid) {
  emulation::copy_async(to, from, kBytes, valid);
}
inline void copy_async_commit() { emulation::copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
  emulation::copy_async_wait(kPending);
}

using CopyBarrier = uint64_t;
bool has_bulk_copies();
inline bool device_has_bulk_copies() { return has_bulk_copies(); }
inline void init_barrier(CopyBarrier& barrier) { emulation::init_barrier(barrier); }
inline void expect_bytes(CopyBarrier& barrier, int bytes) { emulation::expect_bytes(barrier, bytes); }
inline void arrive(CopyBarrier& barrier) { emulation::arrive(barrier); }
inline void end_barrier(CopyBarrier& barrier) { emulation::end_barrier(barrier); }
inline void wait_for_copies(CopyBarrier& barrier, uint32_t phase) { emulation::wait_for_copies(barrier, phase); }
inline void copy_bulk(unsigned char* to, const void* from, int bytes, CopyBarrier& barrier) {
  emulation::copy_bulk(to, from, bytes, barrier);
}
// Has the size and alignment of the driver's map, so that kernel parameters lie as they do on a GPU.
struct alignas(128) PlaneMap {
  const unsigned char* points;
  int64_t volumes;
  int z, y, x, columns, rows;
};
static_assert(sizeof(PlaneMap) == 128, "");
inline void prefetch_map(const PlaneMap&) {}
PlaneMap plane_map(const void* points, int64_t volumes, int z, int y, int x, int columns, int rows);
void copy_plane(unsigned char* to, const PlaneMap& map, int x, int y, int z, int volume, CopyBarrier& barrier);

inline float2 unpack(float2 pair, float) { return pair; }
template <typename T>
float2 unpack(uint32_t pair, T) {
  return {to_float(T{uint16_t(pair)}), to_float(T{uint16_t(pair >> 16)})};
}
template <typename T>
uint32_t pack(float low, float high, T) {
  T l, h;
  from_float(l, low);
  from_float(h, high);
  return l.bits | uint32_t(h.bits) << 16;
}

// Fragments as in the PTX manual. A register is a word, one float or two 16-bit elements; lane = 4 * group + member.
//   a [16, k]: register i holds row group + 8 (i % 2), word member + 4 (i / 2) of it
//   b [k, 8]:  register i holds word member + 4 i of column group
//   d [16, 8]: register i holds row group + 8 (i / 2), column 2 member + i % 2
template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint2 b) {
  struct Operands {
    float* d;
    const uint32_t* a;
    uint2 b;
  } operands{d, a, b};
  emulation::warp_instruction(
      [](void* const* lanes) {
        constexpr int kInWord = 4 / int(sizeof(T)), kDepth = 8 * kInWord;
        float left[16][16], right[16][8];
        const auto put = [](uint32_t word, auto&& element) {
          if constexpr (std::is_same_v<T, float>) {
            element(0) = emulation::tf32_to_float(word);
          } else {
            const float2 pair = unpack(word, T{});
            element(0) = pair.x;
            element(1) = pair.y;
          }
        };
        for (int lane = 0; lane < 32; ++lane) {
          const Operands& own = *static_cast<const Operands*>(lanes[lane]);
          const int group = lane / 4, member = lane % 4;
          for (int i = 0; i < 4; ++i)
            put(own.a[i],
                [&](int j) -> float& { return left[group + 8 * (i % 2)][kInWord * (member + 4 * (i / 2)) + j]; });
          for (int i = 0; i < 2; ++i)
            put(i == 0 ? own.b.x : own.b.y,
                [&](int j) -> float& { return right[kInWord * (member + 4 * i) + j][group]; });
        }
        float product[16][8] = {};
        for (int row = 0; row < 16; ++row)
          for (int k = 0; k < kDepth; ++k)
            for (int column = 0; column < 8; ++column) product[row][column] += left[row][k] * right[k][column];
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i) {
            float& sum = static_cast<const Operands*>(lanes[lane])->d[i];
            sum = emulation::cut_sum(sum, product[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2]);
          }
      },
      &operands);
}

inline uint32_t shared_units(const unsigned char* at) { return uint32_t(at - emulation::shared_memory()) / 16; }
template <bool kTransposed>
void load_matrices(uint32_t (&d)[4], uint32_t row) {
  struct Operands {
    uint32_t* d;
    uint32_t row;
  } operands{d, row};
  emulation::note_read(row);
  emulation::warp_instruction(
      [](void* const* lanes) {
        const auto element = [&](int matrix, int row, int column) {
          const uint32_t at = static_cast<const Operands*>(lanes[8 * matrix + row])->row;
          uint16_t bits;
          std::memcpy(&bits, emulation::shared_memory() + at * 16 + column * 2, sizeof(bits));
          return uint32_t(bits);
        };
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i) {
            const int major = lane / 4, minor = lane % 4 * 2;
            static_cast<const Operands*>(lanes[lane])->d[i] =
                kTransposed ? element(i, minor, major) | element(i, minor + 1, major) << 16
                            : element(i, major, minor) | element(i, major, minor + 1) << 16;
          }
      },
      &operands);
}

inline uint32_t transposed(uint32_t pair) {
  struct Operands {
    uint32_t pair, result;
  } operands{pair, 0};
  emulation::warp_instruction(
      [](void* const* lanes) {
        const auto element = [&](int row, int column) {
          return static_cast<const Operands*>(lanes[4 * row + column / 2])->pair >> (16 * (column % 2)) & 0xffff;
        };
        for (int lane = 0; lane < 32; ++lane) {
          const int row = lane / 4, column = lane % 4 * 2;
          static_cast<Operands*>(lanes[lane])->result = element(column, row) | element(column + 1, row) << 16;
        }
      },
      &operands);
  return operands.result;
}

#define AUTOFOCUS_WARPGROUP_MMA
bool has_warpgroup_mma();
inline bool is_for_hopper() { return true; }
inline void fence_proxies() { emulation::fence_proxies(); }
template <typename T>
emulation::Elements elements_of() {
  return {16 / int(sizeof(T)), [](const unsigned char* row, float* elements) {
            for (int i = 0; i < 16 / int(sizeof(T)); ++i) {
              if constexpr (std::is_same_v<T, float>) {
                uint32_t bits;
                std::memcpy(&bits, row + i * sizeof(T), sizeof(T));
                elements[i] = emulation::tf32_to_float(bits);
              } else {
                T element;
                std::memcpy(&element, row + i * sizeof(T), sizeof(T));
                elements[i] = to_float(element);
              }
            }
          }};
}
template <typename T, int kTiles>
void warpgroup_mma(float (&d)[kTiles][4], uint64_t left, uint64_t right, bool adds) {
  emulation::warpgroup_mma(&d[0][0], kTiles, nullptr, left, right, false, adds, elements_of<T>());
}
template <typename T>
void warpgroup_mma_over_points(float (&d)[3][4], const uint32_t (&rows)[4], uint64_t right) {
  static_assert(sizeof(T) == 2, "the GPU turns 16-bit operands only");
  emulation::warpgroup_mma(&d[0][0], 3, rows, 0, right, true, true, elements_of<T>());
}
inline void warpgroup_begin() {}
inline void warpgroup_commit() { emulation::warpgroup_commit(); }
template <int kPending>
void warpgroup_wait() {
  emulation::warpgroup_wait(kPending);
}
template <int kPending, int kCount, int kTiles>
void warpgroup_wait(float (&)[kCount][kTiles][4]) {
  emulation::warpgroup_wait(kPending);
}

template <typename T>
uint32_t multiply(uint32_t a, uint32_t b, T) {
  const float2 left = unpack(a, T{}), right = unpack(b, T{});
  return pack(left.x * right.x, left.y * right.y, T{});
}

inline float multiply_add(float a, float b, float c) { return a * b + c; }
inline int reread_thread() { return int(threadIdx.x); }
inline int uniform(int value) { return value; }
inline float shuffle_xor(float value, int mask) {
  struct Operands {
    float value;
    int mask;
    float result;
  } operands{value, mask, 0.0f};
  emulation::warp_instruction(
      [](void* const* lanes) {
        for (int lane = 0; lane < 32; ++lane) {
          Operands& own = *static_cast<Operands*>(lanes[lane]);
          own.result = static_cast<const Operands*>(lanes[lane ^ own.mask])->value;
        }
      },
      &operands);
  return operands.result;
}

struct DeviceLimits {
  int multiprocessors, shared_bytes, capability;
};
DeviceLimits device_limits();

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void*,
            Arguments... arguments) {
  if (shared_bytes > device_limits().shared_bytes)
    throw std::runtime_error(std::string(name) + " asks for more shared memory than the device has");
  const std::tuple<Parameters...> parameters(arguments...);
  const auto elsewhere = [&](const auto&... each) {
    return emulation::run_elsewhere(name, reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes,
                                    {&each...}, {sizeof(each)...});
  };
  if (std::apply(elsewhere, parameters)) return;
  emulation::run_blocks(name, grid, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace autofocus::cuda
