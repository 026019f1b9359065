// The functions that the binding (csrc/binding/cuda.cpp) calls: every pass of both tiers, on plain pointers and
// strides. All of them only queue work on the context's stream; none waits for the GPU.
#pragma once

#include <cstdint>
#include <functional>

#include "../call.h"

namespace autofocus::cuda {

// The tensors that every pass reads. `scale` [K, O] (null: ones) and `shift` [K, O] (null: zeros) are s_k and h_k of
// docs/math.md, section 1; their strides are n for branches and c for channels. A bias is a shift with branch stride
// zero.
struct Inputs {
  Problem g;
  DType dtype;
  TensorView input, weight, attention, scale, shift;
  bool tf32;        // whether tensor cores may multiply floats as TF32
  bool few_blocks;  // plan as for a GPU of few multiprocessors (windows/plan.h)
};

// Where a pass runs: a cudaStream_t, and an allocator of device memory for the work that is queued on it until the
// allocator is called again.
struct Context {
  void* stream;
  std::function<void*(int64_t bytes)> scratch;
};

// A tier may refuse each of them separately.
enum class Pass { kForward, kGradInput, kGradAttention, kGradWeight };

// The tensor that begins `elements` elements further on. A null tensor stays null.
inline TensorView advanced(TensorView tensor, int64_t elements, DType dtype) {
  if (tensor.data != nullptr) tensor.data = static_cast<char*>(tensor.data) + elements * element_size(dtype);
  return tensor;
}

// Branch k of a tensor that has a branch stride.
inline TensorView branch_view(const TensorView& branches, int64_t k, DType dtype) {
  TensorView view = advanced(branches, k * branches.k, dtype);
  view.k = 0;
  return view;
}

// The same problem with only `count` branches from `first` on.
inline Problem branches_problem(Problem g, int64_t first, int64_t count) {
  g.K = count;
  for (int64_t k = 0; k < count; ++k) g.dilation[k] = g.dilation[first + k];
  return g;
}

// The gradients of input and weight below also take a gradient for each branch: grad_output [K, N, O, *S_out] with a
// branch stride (docs/branch_norm.md). Then the attention must be ones and `scale` null.

// Simple tier: every geometry and dtype.
void simple_forward(const Inputs& in, const TensorView& output, const Context& context);
void simple_grad_input(const Inputs& in, const TensorView& grad_output, const TensorView& grad_input,
                       const Context& context);
void simple_grad_attention(const Inputs& in, const TensorView& grad_output, const TensorView& grad_attention,
                           const Context& context);
// Computes both gradients in one pass; either may be null.
void simple_grad_weight(const Inputs& in, const TensorView& grad_output, const TensorView& grad_weight,
                        const TensorView& grad_scale, const Context& context);

// Fast tier (windows/): 16 bits and TF32, kernels of 1 or 3 taps an axis, stride 1. fast_refusal gives the reason why
// it does not take a pass on the current device, null if it does; the other functions may only be called if it does.
const char* fast_refusal(Pass pass, const Problem& g, DType dtype, bool tf32);
void fast_forward(const Inputs& in, const TensorView& output, const Context& context);
// Writes each y_k to `branches` [K, N, O, *S_out]. in.attention must be ones.
void fast_branches(const Inputs& in, const TensorView& branches, const Context& context);
// Computes the gradients that are not null.
void fast_backward(const Inputs& in, const TensorView& grad_output, const Gradients& gradients, const Context& context);

// Passes over batch-normalised branches in memory, of either tier (autofocus_kernels/backends/interface.py).
void branch_moments(const BranchTensors& in, void* mean, void* var, const Context& context);
void branch_combine(const BranchTensors& in, const void* scale, const void* shift, const TensorView& output,
                    const Context& context);
// grad_attention may be null.
void branch_reduce(const BranchTensors& in, const void* mean, const void* scale, const void* shift,
                   const TensorView& grad_attention, void* grad_scale, void* grad_shift, const Context& context);
// grad_branches may be the memory of the branches.
void branch_gradients(const BranchTensors& in, const void* a_coef, const void* b_coef, const void* c_coef,
                      const TensorView& grad_branches, const Context& context);

}  // namespace autofocus::cuda
