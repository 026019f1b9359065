// What the binding hands to the kernels of either library: a checked call, on plain pointers and strides.
#pragma once

#include "geometry.h"

namespace autofocus {

// Storage dtypes. Arithmetic is in float, or in double for kFloat64.
enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// A tensor of five axes [n, c, z, y, x] (or its first two), strides in elements. Null where absent. One that holds such
// a tensor for each branch has a branch stride k.
struct TensorView {
  void* data;
  int64_t n, c;
  Index3 s;
  int64_t k = 0;
};

// The tensors that every pass reads. Vectors are contiguous, bias [O], scale and shift [K, O], null where absent: s_k
// and h_k of docs/math.md, section 1.
struct Call {
  Problem g;
  DType dtype;
  TensorView input, weight, attention;
  void *bias, *scale, *shift;
  bool tf32;        // whether a GPU may multiply floats as TF32
  bool few_blocks;  // whether a GPU shall share the work among few thread blocks, as the self-check asks for
};

// Where a backward writes; null where no gradient is wanted.
struct Gradients {
  TensorView input, weight, attention;
  void* scale;  // [K, O]
};

// What the passes over branches in memory know of a call (docs/branch_norm.md): of the problem N, O, K and the output
// size, and the tensors of that size. Vectors beside it are contiguous [K, O] of the accumulator's type.
struct BranchTensors {
  Problem g;
  DType dtype;
  TensorView branches, attention, grad_output;  // the last null where it is not read
};

}  // namespace autofocus
