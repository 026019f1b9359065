// The only file in which a kernel meets CUDA: element types, warp instructions, asynchronous copies, launches.
//
// nvcc takes the first half. Any other compiler takes cuda_emulation.h (tests/cuda_host), which gives the same names to
// code that runs the threads of a block on a CPU; so the tests execute the very kernel bodies the GPU gets.
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

// Dynamic shared memory of the block, 128-byte aligned.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char autofocus_shared[];
  return autofocus_shared;
}

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Asynchronous copy of kBytes (8 or 16) into shared memory; zeros where `valid` is false (nothing is read then).
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
// Waits until at most kPending of this thread's newest groups are still under way.
template <int kPending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Bulk copies, by the copy engine of GPUs from compute capability 9.0 on: one thread asks for them. What they bring is
// counted by a barrier in shared memory. Its phase ends when it has had its one arrival and every byte that it was told
// to expect; the next one begins at once.
using CopyBarrier = uint64_t;
// Volumes of points of 16 bytes, and how many columns and rows of a plane of them one copy takes.
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
// Its memory is for other things now.
__device__ inline void end_barrier(CopyBarrier& barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Waits until a phase has ended, that before the current one or the current one, by its number modulo 2. A copy that
// has not landed after four times 2^32 cycles never will: then the GPU does not hang, but the kernel ends with the
// error of an illegal address (trap would do too, and costs registers).
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
// Fetches a map, which the first copy would wait for.
__device__ inline void prefetch_map(const PlaneMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// To this block's own shared memory. The PTX of CUDA 12.6 has no such name yet; that of a cluster's memory means the
// same for a block alone, but makes code that asks for the block's number where a GPU has no clusters, as sm_120.
#if __CUDA_ARCH__ >= 1000
#define AUTOFOCUS_TO_BLOCK "shared::cta"
#else
#define AUTOFOCUS_TO_BLOCK "shared::cluster"
#endif
// A multiple of 16 bytes, at multiples of 16.
__device__ inline void copy_bulk(unsigned char* to, const void* from, int bytes, CopyBarrier& barrier) {
  asm volatile("cp.async.bulk." AUTOFOCUS_TO_BLOCK
               ".global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}
// The map's columns and rows of one plane of a volume, from point (x, y, z) on, row behind row, to a multiple of 128
// bytes. Points outside the volume are zeros, and counted like all others.
__device__ inline void copy_plane(unsigned char* to, const PlaneMap& map, int x, int y, int z, int volume,
                                  CopyBarrier& barrier) {
  asm volatile("cp.async.bulk.tensor.4d." AUTOFOCUS_TO_BLOCK
               ".global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(to)),
               "l"(&map), "r"(4 * x), "r"(y), "r"(z), "r"(volume), "r"(shared_address(&barrier))
               : "memory");
}
#undef AUTOFOCUS_TO_BLOCK
// Copy engine and warpgroup MMA reach shared memory by a way of their own. What they do there behind the next barrier
// of the block comes after what this thread has done by ordinary instructions: written, read, a barrier set up.
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

// The nearest number of 10 bits behind the point, as TF32 has them, halves away from zero. The tensor cores would cut
// the rest off.
__device__ inline uint32_t tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// d[16x8] += a[16xk] b[kx8] over the warp; k is 16, or 8 with float, whose operands are TF32. Fragment layouts are
// those of the PTX manual, mma.m16n8k16 and m16n8k8.
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

// A place in shared memory in units of 16 bytes, as ldmatrix (times 16) and the descriptors of warpgroup MMA count.
__device__ inline uint32_t shared_units(const unsigned char* at) { return shared_address(at) >> 4; }

// Four 8x8 matrices of 16-bit elements, of which lane i gives row i % 8 of matrix i / 8. A lane gets elements 2 (lane %
// 4) and the next of row lane / 4 of each, or element lane % 4 of a row of four floats; of column lane / 4 if
// kTransposed, which is for 16 bits.
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

// The transpose of an 8x8 matrix of 16-bit elements, of which a lane has elements 2 (lane % 4) and the next of row lane
// / 4.
__device__ inline uint32_t transposed(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Warpgroup MMA is Hopper's alone. Machine code made for sm_90a has it, and nothing else does: not sm_90, not what a
// driver compiles from PTX.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define AUTOFOCUS_WARPGROUP_MMA
__device__ constexpr bool has_warpgroup_mma() { return true; }

// `layouts`: that neither operand is transposed, which 16-bit types are asked.
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

// d = a b, added to d if `add`; operands as product.h encodes them.
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
// d += a b, with the warps' rows of a in registers and b read the other way round: rows are k.
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
  // Or the compiler could read d before it waits.
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

// Whether this is code for compute capability 9.0: as 90a it has warpgroup MMA, as 90 it has not.
#if __CUDA_ARCH__ == 900
__device__ constexpr bool is_for_hopper() { return true; }
#else
__device__ constexpr bool is_for_hopper() { return false; }
#endif

// a b + c in one instruction, also where the compiler joins what is common to two ways to it.
__device__ inline float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// threadIdx.x, whose consequences the compiler is not to keep in registers from one use to the next.
__device__ inline int reread_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
// A number that is the same in all lanes of a warp, so that the compiler sees it.
__device__ inline int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }
__device__ inline float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Two neighbouring 16-bit elements in one register, the first in the low half. Of floats a pair is two.
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
// Two products of neighbours, each rounded once.
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
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("autofocus_cuda: ") + what + ": " + cudaGetErrorString(error));
}

// What a launch plan depends on, of the current device.
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

// [volume, z, y, x] points in memory one behind the other, and the columns and rows of a copy. By a function of the
// driver, which has it for every GPU with a copy engine; this thread must have called the runtime before, as every pass
// has by packing its operands.
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
  // A point is four words.
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

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void* stream,
            Arguments... arguments) {
  // More than 48 KB has to be asked for, kernel by kernel.
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

}  // namespace autofocus::cuda

#else
#include "cuda_emulation.h"
#endif
