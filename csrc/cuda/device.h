// The only file where kernels touch CUDA itself: element types, inline PTX, asynchronous copies, launches. Every kernel
// includes it.
//
// nvcc compiles the first half. Any other compiler includes cuda_emulation.h (tests/cuda_host) instead, which defines
// the same names for threads that run on a CPU. So the tests execute the same kernel bodies as a GPU.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(__CUDACC__)

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace autofocus::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(Half value) { return __half2float(value); }
__device__ inline float to_float(BFloat16 value) { return __bfloat162float(value); }
__device__ inline void from_float(Half& to, float value) { to = __float2half_rn(value); }
__device__ inline void from_float(BFloat16& to, float value) { to = __float2bfloat16_rn(value); }

// The block's dynamic shared memory, aligned to 128 bytes because bulk copies of planes need it.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char autofocus_shared[];
  return autofocus_shared;
}

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Asynchronous copy of kBytes (8 or 16) from global to shared memory by this thread. If not `valid` it writes zeros and
// reads nothing, so `from` may point anywhere.
template <int kBytes>
__device__ inline void copy_async(unsigned char* to, const void* from, bool valid) {
  const uint32_t address = shared_address(to);
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the newest kPending groups of this thread have landed. Other threads see them after a barrier.
template <int kPending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Bulk copies: from compute capability 9.0 on, one thread asks the copy engine for a whole copy. A barrier in shared
// memory (an mbarrier) counts the bytes that land. Its phase ends after one arrival and once every expected byte has
// landed, in any order; the next phase begins at once. Bytes may land before they are expected, because without the
// arrival no phase ends.
using CopyBarrier = uint64_t;
// Describes volumes of points of 16 bytes to the copy engine, and the box of a plane (columns, rows) that a copy takes.
using PlaneMap = CUtensorMap;

#if __CUDA_ARCH__ >= 900
__device__ constexpr bool has_bulk_copies() { return true; }
__device__ inline void init_barrier(CopyBarrier& barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
}
__device__ inline void expect_bytes(CopyBarrier& barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}
__device__ inline void arrive(CopyBarrier& barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Ends the barrier's life, so that its memory can hold other data.
__device__ inline void end_barrier(CopyBarrier& barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Waits until the phase with number `phase` modulo 2 has ended. It must be the barrier's current phase or the one
// before. The thread then sees what the phase's copies wrote. After more than 4 * 2^32 cycles (some ten seconds) a copy
// will never land: a store to address 0 then ends the kernel with an error instead of a hang (trap would cost
// registers).
__device__ inline void wait_for_copies(CopyBarrier& barrier, uint32_t phase) {
  asm volatile(
      "{\n.reg .pred ended, late;\n.reg .u32 begun, now;\n.reg .u64 nowhere;\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 ended, [%0], %1;\n"
      "@ended bra ENDED;\n"
      "mov.u64 nowhere, 0;\n"
      "mov.u32 begun, %%clock_hi;\n"
      "WAIT:\n"
      "mov.u32 now, %%clock_hi;\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 ended, [%0], %1;\n"
      "@ended bra ENDED;\n"
      "sub.u32 now, now, begun;\n"
      "setp.gt.u32 late, now, 4;\n"
      "@late st.global.u32 [nowhere], now;\n"
      "bra WAIT;\n"
      "ENDED:\n}\n" ::"r"(shared_address(&barrier)),
      "r"(phase)
      : "memory");
}
// Fetches a map early; otherwise the first copy would wait for it.
__device__ inline void prefetch_map(const PlaneMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// The destination of a bulk copy is this block's own shared memory. The PTX of CUDA 12.6 has no shared::cta here.
// shared::cluster means the same for a block that is its own cluster, but on sm_120, which has no clusters, it adds
// code that looks up the block's number.
#if __CUDA_ARCH__ >= 1000
#define AUTOFOCUS_TO_BLOCK "shared::cta"
#else
#define AUTOFOCUS_TO_BLOCK "shared::cluster"
#endif
// Copies `bytes` bytes, a multiple of 16; both addresses are multiples of 16.
__device__ inline void copy_bulk(unsigned char* to, const void* from, int bytes, CopyBarrier& barrier) {
  asm volatile("cp.async.bulk." AUTOFOCUS_TO_BLOCK
               ".global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}
// Copies the map's box from plane z of a volume, beginning at column x and row y. Rows follow each other without gaps
// from `to` on, a multiple of 128 bytes. Points outside the volume become zeros, and the barrier counts them too.
__device__ inline void copy_plane(unsigned char* to, const PlaneMap& map, int x, int y, int z, int volume,
                                  CopyBarrier& barrier) {
  asm volatile("cp.async.bulk.tensor.4d." AUTOFOCUS_TO_BLOCK
               ".global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(to)),
               "l"(&map), "r"(4 * x), "r"(y), "r"(z), "r"(volume), "r"(shared_address(&barrier))
               : "memory");
}
#undef AUTOFOCUS_TO_BLOCK
// The copy engine and warpgroup MMA access shared memory through a proxy of their own (the async proxy), which barriers
// alone do not order with ordinary instructions. A thread that has read, written or set up a barrier there with
// ordinary instructions calls this before the block's next barrier; what the async proxy does after that barrier comes
// later.
__device__ inline void fence_proxies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
__device__ constexpr bool has_bulk_copies() { return false; }
__device__ inline void init_barrier(CopyBarrier&) {}
__device__ inline void expect_bytes(CopyBarrier&, int) {}
__device__ inline void arrive(CopyBarrier&) {}
__device__ inline void end_barrier(CopyBarrier&) {}
__device__ inline void prefetch_map(const PlaneMap&) {}
__device__ inline void wait_for_copies(CopyBarrier&, uint32_t) {}
__device__ inline void copy_bulk(unsigned char*, const void*, int, CopyBarrier&) {}
__device__ inline void copy_plane(unsigned char*, const PlaneMap&, int, int, int, int, CopyBarrier&) {}
__device__ inline void fence_proxies() {}
#endif

__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Rounds to TF32 (10 fraction bits), to nearest with halves away from zero. Tensor cores would cut the other bits off.
__device__ inline uint32_t tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// d[16 x 8] += a[16 x k] b[k x 8] by one warp. k is 16 for 16-bit types, and 8 for float, whose operands are TF32. The
// fragment layouts are those of mma.m16n8k16 and m16n8k8 in the PTX manual.
template <typename T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint2 b) {
  if constexpr (std::is_same_v<T, float>)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
  else if constexpr (std::is_same_v<T, Half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

// An address in shared memory in units of 16 bytes, the unit of warpgroup MMA descriptors and of load_matrices.
__device__ inline uint32_t shared_units(const unsigned char* at) { return shared_address(at) >> 4; }

// Loads four 8x8 matrices of 16-bit elements with a warp. Lane i passes the address of row i % 8 of matrix i / 8, in
// units of 16 bytes. From each matrix a lane gets elements 2 (lane % 4) and 2 (lane % 4) + 1 of row lane / 4, or of
// column lane / 4 if kTransposed. A row may also be four floats: a lane then gets float lane % 4 (never transposed).
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&d)[4], uint32_t row) {
  const uint32_t address = row * 16;
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

// Transposes an 8x8 matrix of 16-bit elements held by a warp: a lane has elements 2 (lane % 4) and 2 (lane % 4) + 1 of
// row lane / 4.
__device__ inline uint32_t transposed(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Only Hopper has warpgroup MMA, and only in machine code compiled for sm_90a: not for sm_90, and not when a driver
// compiles PTX.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define AUTOFOCUS_WARPGROUP_MMA
__device__ constexpr bool has_warpgroup_mma() { return true; }

// `layouts` says that neither operand is transposed. Only 16-bit types have these two flags.
#define AUTOFOCUS_MMA(k, type, layouts, n, d_list, left, right, adds, ...)                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " adds                                                            \
               ", 0;\n"                                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" n "k" k ".f32." type "." type " {" d_list "}, " left ", " right \
               ", p, 1, 1" layouts ";\n}\n"                                                                        \
               : __VA_ARGS__                                                                                       \
               : "l"(a), "l"(b), "r"(int(add)))
#define AUTOFOCUS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define AUTOFOCUS_12 AUTOFOCUS_8 ", %8, %9, %10, %11"
#define AUTOFOCUS_16 AUTOFOCUS_12 ", %12, %13, %14, %15"
#define AUTOFOCUS_20 AUTOFOCUS_16 ", %16, %17, %18, %19"
#define AUTOFOCUS_32 AUTOFOCUS_20 ", %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define AUTOFOCUS_D(tile) "+f"(d[tile][0]), "+f"(d[tile][1]), "+f"(d[tile][2]), "+f"(d[tile][3])
#define AUTOFOCUS_D2 AUTOFOCUS_D(0), AUTOFOCUS_D(1)
#define AUTOFOCUS_D3 AUTOFOCUS_D2, AUTOFOCUS_D(2)
#define AUTOFOCUS_D4 AUTOFOCUS_D3, AUTOFOCUS_D(3)
#define AUTOFOCUS_D5 AUTOFOCUS_D4, AUTOFOCUS_D(4)
#define AUTOFOCUS_D8 AUTOFOCUS_D5, AUTOFOCUS_D(5), AUTOFOCUS_D(6), AUTOFOCUS_D(7)
#define AUTOFOCUS_MMA_OF(k, type, layouts)                                                                           \
  if constexpr (kTiles == 2) AUTOFOCUS_MMA(k, type, layouts, "16", AUTOFOCUS_8, "%8", "%9", "%10", AUTOFOCUS_D2);    \
  if constexpr (kTiles == 4) AUTOFOCUS_MMA(k, type, layouts, "32", AUTOFOCUS_16, "%16", "%17", "%18", AUTOFOCUS_D4); \
  if constexpr (kTiles == 5) AUTOFOCUS_MMA(k, type, layouts, "40", AUTOFOCUS_20, "%20", "%21", "%22", AUTOFOCUS_D5); \
  if constexpr (kTiles == 8) AUTOFOCUS_MMA(k, type, layouts, "64", AUTOFOCUS_32, "%32", "%33", "%34", AUTOFOCUS_D8)
#define AUTOFOCUS_MMA_OVER_POINTS(type)                                             \
  asm volatile(                                                                     \
      "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                    \
      "wgmma.mma_async.sync.aligned.m64n24k16.f32." type "." type " {" AUTOFOCUS_12 \
      "}, {%12, %13, %14, %15}, %16, p, 1, 1, 1;\n}\n"                              \
      : AUTOFOCUS_D3                                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// d = a b, or d += a b if `add`, by a warpgroup: 64 rows by 8 kTiles columns. a and b are descriptors of operands in
// shared memory (encoded() in product.h). d holds the result only after warpgroup_wait.
template <typename T, int kTiles>
__device__ inline void warpgroup_mma(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool add) {
  static_assert(kTiles == 2 || kTiles == 4 || kTiles == 5 || kTiles == 8, "written down for these only");
  if constexpr (std::is_same_v<T, float>) {
    AUTOFOCUS_MMA_OF("8", "tf32", "");
  } else if constexpr (std::is_same_v<T, Half>) {
    AUTOFOCUS_MMA_OF("16", "f16", ", 0, 0");
  } else {
    AUTOFOCUS_MMA_OF("16", "bf16", ", 0, 0");
  }
}
// d += a b, where each warp holds its 16 rows of a in registers and b is read transposed: a row in memory is a k.
template <typename T>
__device__ inline void warpgroup_mma_over_points(float (&d)[3][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, Half>)
    AUTOFOCUS_MMA_OVER_POINTS("f16");
  else
    AUTOFOCUS_MMA_OVER_POINTS("bf16");
}
__device__ inline void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
template <int kPending, int kCount, int kTiles>
__device__ inline void warpgroup_wait(float (&d)[kCount][kTiles][4]) {
  warpgroup_wait<kPending>();
  // Makes the compiler believe that d changes here. Otherwise it could read d before the wait.
#pragma unroll
  for (int m = 0; m < kCount; ++m)
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      asm volatile("" : "+f"(d[m][tile][0]), "+f"(d[m][tile][1]), "+f"(d[m][tile][2]), "+f"(d[m][tile][3])::"memory");
}

#undef AUTOFOCUS_MMA
#undef AUTOFOCUS_MMA_OF
#undef AUTOFOCUS_MMA_OVER_POINTS
#else
__device__ constexpr bool has_warpgroup_mma() { return false; }
#endif

// Whether this code is for compute capability 9.0. Compiled as sm_90a it has warpgroup MMA, as sm_90 it has not.
#if __CUDA_ARCH__ == 900
__device__ constexpr bool is_for_hopper() { return true; }
#else
__device__ constexpr bool is_for_hopper() { return false; }
#endif

// a b + c in one instruction, even where the compiler merges two code paths that share only a part of it.
__device__ inline float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// threadIdx.x, read anew. The compiler cannot keep values derived from it in registers between uses.
__device__ inline int reread_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
// Tells the compiler that `value` is the same in all lanes of a warp, as the caller knows.
__device__ inline int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }
__device__ inline float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// A pair is two neighbouring elements: two 16-bit ones in a register, the first in the low half, or two floats.
__device__ inline float2 unpack(float2 pair, float) { return pair; }
__device__ inline float2 unpack(uint32_t pair, Half) {
  __half2 halves;
  memcpy(&halves, &pair, sizeof(pair));
  return __half22float2(halves);
}
__device__ inline float2 unpack(uint32_t pair, BFloat16) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
__device__ inline uint32_t pack(float low, float high, Half) {
  const __half2 halves = __floats2half2_rn(low, high);
  uint32_t pair;
  memcpy(&pair, &halves, sizeof(pair));
  return pair;
}
__device__ inline uint32_t pack(float low, float high, BFloat16) {
  const __nv_bfloat162 halves = __floats2bfloat162_rn(low, high);
  uint32_t pair;
  memcpy(&pair, &halves, sizeof(pair));
  return pair;
}
// Multiplies two pairs of 16-bit elements, rounding each product once.
template <typename T>
__device__ inline uint32_t multiply(uint32_t a, uint32_t b, T) {
  std::conditional_t<std::is_same_v<T, Half>, __half2, __nv_bfloat162> left, right;
  memcpy(&left, &a, sizeof(a));
  memcpy(&right, &b, sizeof(b));
  left = __hmul2_rn(left, right);
  memcpy(&a, &left, sizeof(a));
  return a;
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it: torch would take it for its next launch's, where another backend takes over
  throw std::runtime_error(std::string("autofocus_cuda: ") + what + ": " + cudaGetErrorString(error));
}

// What a launch plan needs to know of the current device.
struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // largest dynamic shared memory of a block
  int capability;    // 10 * major + minor
};
inline DeviceLimits device_limits() {
  int device = 0, multiprocessors = 0, shared_bytes = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory size");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  return {multiprocessors, shared_bytes, 10 * major + minor};
}

inline bool device_has_bulk_copies() { return device_limits().capability >= 90; }

// The map of contiguous points [volumes, z, y, x], of which one copy takes columns x rows points of a plane. Only the
// driver can encode it, so this asks the runtime for the driver's function; every driver for a GPU with a copy engine
// has it. This thread must have called the runtime before: a pass has launched its packing kernel.
inline PlaneMap plane_map(const void* points, int64_t volumes, int z, int y, int x, int columns, int rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
#endif
          "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("autofocus_cuda: the driver has no cuTensorMapEncodeTiled, as CUDA 12 has it");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  // Sizes and boxes count words of 4 bytes along x: a point has four.
  const uint64_t sizes[] = {uint64_t(4) * x, uint64_t(y), uint64_t(z), uint64_t(volumes)};
  const uint64_t strides[] = {uint64_t(16) * x, uint64_t(16) * x * y, uint64_t(16) * x * y * z};  // bytes, from y on
  const uint32_t box[] = {4u * uint32_t(columns), uint32_t(rows), 1, 1}, every[] = {1, 1, 1, 1};
  PlaneMap map;
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT32, 4, const_cast<void*>(points), sizes, strides,
                                 box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("autofocus_cuda: cuTensorMapEncodeTiled: error " + std::to_string(int(result)));
  return map;
}

// Launches a kernel with `threads` threads a block and so many bytes of dynamic shared memory. `name` is for errors.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void* stream,
            Arguments... arguments) {
  // CUDA gives a kernel more than 48 KB only on request.
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

}  // namespace autofocus::cuda

#else
#include "cuda_emulation.h"
#endif
