// What the binding calls: both tiers of every pass, on plain pointers and strides.
#pragma once

#include <cstdint>
#include <functional>

#include "../geometry.h"

namespace autofocus::cuda {

enum class DType { kFloat64, kFloat32, kFloat16, kBFloat16 };

// A tensor of five axes [n, c, z, y, x] (or its first two), strides in elements. Null where absent. A tensor that holds
// one of these for each branch has a branch stride k.
struct TensorArgument {
  void* data;
  int64_t n, c;
  Index3 s;
  int64_t k = 0;
};

// The tensors every pass reads. `scale` [K, O] (null: ones) and `shift` [K, O] (null: zeros) are s_k and h_k of
// docs/math.md, section 1; a bias is a shift that is the same for every branch, so its branch stride is zero.
struct Inputs {
  Problem g;
  DType dtype;
  TensorArgument input, weight, attention, scale, shift;
};

// Where a pass runs: a cudaStream_t, and device memory that lives until the work queued on that stream is done.
struct Context {
  void* stream;
  std::function<void*(int64_t bytes)> scratch;
};

// The passes a tier can refuse one by one. kBranchGradInput: of a gradient for each branch.
enum class Pass { kForward, kGradInput, kGradAttention, kGradWeight, kBranchGradInput };

// Gradients of input and weight also take one gradient for each branch, grad_output [K, N, O, *S_out]
// (docs/branch_norm.md); then the attention must be ones and there may be no scale.

// The problem of branch k alone.
inline Problem branch_problem(Problem g, int64_t k) {
  g.K = 1;
  g.dilation[0] = g.dilation[k];
  return g;
}

// Simple tier: every geometry and dtype.
void simple_forward(const Inputs& in, const TensorArgument& output, const Context& context);
void simple_grad_input(const Inputs& in, const TensorArgument& grad_output, const TensorArgument& grad_input,
                       const Context& context);
void simple_grad_attention(const Inputs& in, const TensorArgument& grad_output, const TensorArgument& grad_attention,
                           const Context& context);
// Either gradient may be null: one pass serves both.
void simple_grad_weight(const Inputs& in, const TensorArgument& grad_output, const TensorArgument& grad_weight,
                        const TensorArgument& grad_scale, const Context& context);

// Fast tier: 16-bit, 3x3x3, staged sub-lattice tiles. Null if it takes the pass on the current device, else the reason.
const char* fast_refusal(Pass pass, const Problem& g, DType dtype);
void fast_forward(const Inputs& in, const TensorArgument& output, const Context& context);
// Branch k alone, without attention: in.attention must be ones. Takes what fast_refusal lets pass for all branches or
// for branch_problem(k).
void fast_branch(const Inputs& in, int64_t k, const TensorArgument& branch, const Context& context);
void fast_grad_input(const Inputs& in, const TensorArgument& grad_output, const TensorArgument& grad_input,
                     const Context& context);
void fast_grad_attention(const Inputs& in, const TensorArgument& grad_output, const TensorArgument& grad_attention,
                         const Context& context);
void fast_grad_weight(const Inputs& in, const TensorArgument& grad_output, const TensorArgument& grad_weight,
                      const TensorArgument& grad_scale, const Context& context);

// Batch-normalised branches, as in autofocus_kernels/norm_ops.py. Of `g` only N, O, K and the output size are read.
// Vectors are contiguous [K, O] of the accumulator's type.
struct NormInputs {
  Problem g;
  DType dtype;
  TensorArgument branches, attention, grad_output;
};
void branch_moments(const NormInputs& in, void* mean, void* var, const Context& context);
void branch_combine(const NormInputs& in, const void* scale, const void* shift, const TensorArgument& output,
                    const Context& context);
// grad_attention may be null.
void branch_reduce(const NormInputs& in, const void* mean, const void* scale, const void* shift,
                   const TensorArgument& grad_attention, void* grad_scale, void* grad_shift, const Context& context);
// grad_branches may be the branches themselves.
void branch_gradients(const NormInputs& in, const void* a_coef, const void* b_coef, const void* c_coef,
                      const TensorArgument& grad_branches, const Context& context);

}  // namespace autofocus::cuda
