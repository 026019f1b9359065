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

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace autofocus::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

__device__ inline float to_float(Half value) { return __half2float(value); }
__device__ inline float to_float(BFloat16 value) { return __bfloat162float(value); }
__device__ inline void from_float(Half& to, float value) { to = __float2half_rn(value); }
__device__ inline void from_float(BFloat16& to, float value) { to = __float2bfloat16_rn(value); }

// Dynamic shared memory of the block, 16-byte aligned.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ uint4 autofocus_shared[];
  return reinterpret_cast<unsigned char*>(autofocus_shared);
}

// Asynchronous copy of kBytes (8 or 16) into shared memory; zeros where `valid` is false (nothing is read then).
template <int kBytes>
__device__ inline void copy_async(unsigned char* to, const void* from, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
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

// d[16x8] += a[16x16] b[16x8] over the warp; fragment layouts are those of the PTX manual, mma.m16n8k16.
template <typename T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint2 b) {
  if constexpr (std::is_same_v<T, Half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

// Transposes the 8x8 matrix of 16-bit elements the warp holds, one 32-bit register a lane.
__device__ inline uint32_t transpose_8x8(uint32_t fragment) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(fragment));
  return result;
}

__device__ inline float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Two neighbouring 16-bit elements in one register, the first in the low half.
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
