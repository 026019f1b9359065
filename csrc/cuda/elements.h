// What kernels of both tiers share: accumulator types, loads and stores of elements, typed views of tensors, a block's
// sum, and the switch from a dtype to an element type.
#pragma once

#include "device.h"
#include "kernels.h"

namespace autofocus::cuda {

// The type that sums are kept in: double for double, else float.
template <typename T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::Type;

__device__ inline double to_accumulator(double value) { return value; }
__device__ inline float to_accumulator(float value) { return value; }
__device__ inline float to_accumulator(Half value) { return to_float(value); }
__device__ inline float to_accumulator(BFloat16 value) { return to_float(value); }

// Two neighbouring elements, the argument of unpack (device.h).
template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, float>, float2, uint32_t>;

__device__ inline void store(double* to, double value) { *to = value; }
__device__ inline void store(float* to, float value) { *to = value; }
__device__ inline void store(Half* to, float value) { from_float(*to, value); }
__device__ inline void store(BFloat16* to, float value) { from_float(*to, value); }

template <typename T>
__device__ inline Pair<T> pack_pair(const float2& values, T) {
  if constexpr (std::is_same_v<T, float>)
    return values;
  else
    return pack(values.x, values.y, T{});
}

// A TensorView with its element type. Strides count elements; all offsets are 64-bit.
template <typename T>
struct Strided {
  T* data;
  int64_t n, c;
  Index3 s;
  int64_t k;  // from one branch to the next, 0 if there is one tensor for all branches

  explicit Strided(const TensorView& tensor)
      : data(static_cast<T*>(tensor.data)), n(tensor.n), c(tensor.c), s(tensor.s), k(tensor.k) {}

  AUTOFOCUS_HD T* at(int64_t i, int64_t j, const Index3& p) const {
    return data + i * n + j * c + p.z * s.z + p.y * s.y + p.x * s.x;
  }
};

// How many bytes can be loaded at once at every position of a volume: the largest power of two, at most 16, that
// divides all their addresses. 1 if channels are not contiguous.
inline int alignment_of(const TensorView& volume, int element) {
  if (volume.c != 1) return 1;
  const int64_t strides = volume.n | volume.s.z | volume.s.y | volume.s.x | volume.k;
  int bytes = 16;
  while (bytes > element && (reinterpret_cast<uintptr_t>(volume.data) | uint64_t(strides) * element) % bytes != 0)
    bytes /= 2;
  return bytes;
}

// Element [k, o] of a branch scale or shift.
template <typename T>
__device__ inline Accumulator<T> branch_value(const Strided<const T>& matrix, int64_t k, int64_t o) {
  return to_accumulator(matrix.data[k * matrix.n + o * matrix.c]);
}

// Adds up each of `rows` rows of kThreads values in shared memory into its first element, as a tree, so in a fixed
// order. All kThreads threads of the block call it; it begins and ends with a barrier.
template <int kThreads, typename A>
__device__ inline void sum_rows(A* values, int rows) {
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int i = threadIdx.x; i < rows * half; i += kThreads) {
      A* at = values + i / half * kThreads + i % half;
      *at += at[half];
    }
  }
  __syncthreads();
}

// Calls function(T{}) with the element type of `dtype`.
template <typename Function>
void for_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat64: return function(double{});
    case DType::kFloat32: return function(float{});
    case DType::kFloat16: return function(Half{});
    case DType::kBFloat16: return function(BFloat16{});
  }
}

// The same for the element types of the fast tier, where tensor cores multiply float as TF32.
template <typename Function>
void for_matrix_dtype(DType dtype, Function&& function) {
  if (dtype == DType::kFloat32) return function(float{});
  if (dtype == DType::kFloat16) return function(Half{});
  return function(BFloat16{});
}

}  // namespace autofocus::cuda
