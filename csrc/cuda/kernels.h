// What the binding calls: both tiers of every pass, on plain pointers and strides.
#pragma once

#include <cstdint>
#include <functional>

#include "../call.h"

namespace autofocus::cuda {

// The tensors every pass reads. `scale` [K, O] (null: ones) and `shift` [K, O] (null: zeros) are s_k and h_k of
// docs/math.md, section 1; a bias is a shift that is the same for every branch, so its branch stride is zero.
struct Inputs {
  Problem g;
  DType dtype;
  TensorView input, weight, attention, scale, shift;
  bool tf32;  // whether products of floats may be TF32
};

// Where a pass runs: a cudaStream_t, and device memory that lives until the work queued on that stream is done.
struct Context {
  void* stream;
  std::function<void*(int64_t bytes)> scratch;
};

// The passes a tier can refuse one by one.
enum class Pass { kForward, kGradInput, kGradAttention, kGradWeight };

// Gradients of input and weight also take one gradient for each branch, grad_output [K, N, O, *S_out]
// (docs/branch_norm.md); then the attention must be ones and there may be no scale.

// The tensor that begins some elements further on; one that is absent stays so.
inline TensorView advanced(TensorView tensor, int64_t elements, DType dtype) {
  if (tensor.data != nullptr) tensor.data = static_cast<char*>(tensor.data) + elements * element_size(dtype);
  return tensor;
}

// Branch k of a tensor for each branch.
inline TensorView branch_view(const TensorView& branches, int64_t k, DType dtype) {
  TensorView view = advanced(branches, k * branches.k, dtype);
  view.k = 0;
  return view;
}

// The problem of some of the branches alone.
inline Problem branches_problem(Problem g, int64_t first, int64_t count) {
  g.K = count;
  for (int64_t k = 0; k < count; ++k) g.dilation[k] = g.dilation[first + k];
  return g;
}

// Simple tier: every geometry and dtype.
void simple_forward(const Inputs& in, const TensorView& output, const Context& context);
void simple_grad_input(const Inputs& in, const TensorView& grad_output, const TensorView& grad_input,
                       const Context& context);
void simple_grad_attention(const Inputs& in, const TensorView& grad_output, const TensorView& grad_attention,
                           const Context& context);
// Either gradient may be null: one pass serves both.
void simple_grad_weight(const Inputs& in, const TensorView& grad_output, const TensorView& grad_weight,
                        const TensorView& grad_scale, const Context& context);

// Fast tier (windows/): 16 bits and TF32, kernels of 1 or 3 taps an axis, stride 1. Null if it takes the pass on the
// current device, else the reason.
const char* fast_refusal(Pass pass, const Problem& g, DType dtype, bool tf32);
void fast_forward(const Inputs& in, const TensorView& output, const Context& context);
// Every branch alone, into its part of `branches` [K, N, O, *S_out], without attention: in.attention must be ones.
void fast_branches(const Inputs& in, const TensorView& branches, const Context& context);
// The gradients that are not null, of passes that fast_refusal lets pass.
void fast_backward(const Inputs& in, const TensorView& grad_output, const Gradients& gradients, const Context& context);

// Batch-normalised branches that exist in memory (autofocus_kernels/backends/interface.py).
void branch_moments(const BranchTensors& in, void* mean, void* var, const Context& context);
void branch_combine(const BranchTensors& in, const void* scale, const void* shift, const TensorView& output,
                    const Context& context);
// grad_attention may be null.
void branch_reduce(const BranchTensors& in, const void* mean, const void* scale, const void* shift,
                   const TensorView& grad_attention, void* grad_scale, void* grad_shift, const Context& context);
// grad_branches may be the branches themselves.
void branch_gradients(const BranchTensors& in, const void* a_coef, const void* b_coef, const void* c_coef,
                      const TensorView& grad_branches, const Context& context);

}  // namespace autofocus::cuda
