// Gradient of the input, fast tier: the forward's blend run backwards (docs/math.md, section 3).
#include "fast_blend.h"

namespace autofocus::cuda {

void fast_grad_input(const Inputs& in, const TensorArgument& grad_output, const TensorArgument& grad_input,
                     const Context& context) {
  Plan plan;
  if (const char* refusal = make_plan(in, Pass::kGradInput, plan)) throw std::runtime_error(refusal);
  fast_blend_pass<true>("fast_grad_input", plan, in, grad_output, grad_input, context);
}

}  // namespace autofocus::cuda
