// The kernels of one instruction set, as the binding calls them.
#pragma once

#include "../call.h"
#include "arguments.h"

namespace autofocus {

// The tensors of a call whatever their dtype; kernels cast the views to their own.
struct Kernels {
  const char* name;
  void (*forward)(DType, const ForwardArguments<void>&);
  void (*backward)(DType, const BackwardArguments<void>&);
  using Norm = void (*)(DType, const NormArguments<void, void>&);
  Norm branch_statistics, branch_combine, branch_reduce, branch_norm_backward;
};

extern const Kernels avx512_kernels, avx2_kernels, generic_kernels;

}  // namespace autofocus
