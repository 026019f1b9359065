// The functions of the CUDA runtime that benchmarks/probes call, on a CPU: device memory is host memory.
#pragma once

#include <cstdlib>
#include <cstring>

#include "cuda_emulation.h"

#define __host__

enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };

template <typename T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  *pointer = static_cast<T*>(std::malloc(bytes));
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline long long clock64() { return 0; }

namespace autofocus::cuda {
inline void check(cudaError_t, const char*) {}
}  // namespace autofocus::cuda
