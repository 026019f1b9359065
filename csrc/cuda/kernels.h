// What the binding calls: both tiers of every pass, on plain pointers and strides.
#pragma once

#include <cstdint>
#include <functional>

#include "../geometry.h"

namespace autofocus::cuda {

enum class DType { kFloat64, kFloat32, kFloat16, kBFloat16 };

// A tensor of five axes [n, c, z, y, x] (or its first two), strides in elements. Null where absent.
struct TensorArgument {
  void* data;
  int64_t n, c;
  Index3 s;
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

// The passes a tier can refuse one by one.
enum class Pass { kForward, kGradInput, kGradAttention, kGradWeight };

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
void fast_grad_input(const Inputs& in, const TensorArgument& grad_output, const TensorArgument& grad_input,
                     const Context& context);
void fast_grad_attention(const Inputs& in, const TensorArgument& grad_output, const TensorArgument& grad_attention,
                         const Context& context);
void fast_grad_weight(const Inputs& in, const TensorArgument& grad_output, const TensorArgument& grad_weight,
                      const TensorArgument& grad_scale, const Context& context);

}  // namespace autofocus::cuda
