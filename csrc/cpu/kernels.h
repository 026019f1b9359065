// The kernels of one instruction set, as the binding calls them.
#pragma once

#include "../call.h"
#include "arguments.h"

namespace autofocus {

// Vectors of the last four are contiguous [K, O] of the accumulator's type.
struct Kernels {
  const char* name;
  void (*forward)(const Call&, const TensorView& output, ParallelFor);
  void (*backward)(const Call&, const TensorView& grad_output, const Gradients&, ParallelFor);
  void (*branch_statistics)(const Call&, const TensorView& branches, void* mean, void* var, ParallelFor);
  void (*branch_combine)(const BranchTensors&, void* scale, void* shift, const TensorView& output, ParallelFor);
  void (*branch_reduce)(const BranchTensors&, void* mean, void* scale, void* shift, const TensorView& grad_attention,
                        void* grad_scale, void* grad_shift, ParallelFor);
  void (*branch_norm_backward)(const Call&, const BranchTensors&, void* a_coef, void* b_coef, void* c_coef,
                               const TensorView& grad_input, const TensorView& grad_weight, ParallelFor);
};

extern const Kernels avx512_kernels, avx2_kernels, generic_kernels;

}  // namespace autofocus
