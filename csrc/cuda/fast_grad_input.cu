// Gradient of the input, fast tier: the forward's blend run backwards (docs/math.md, section 3).
#include "fast_blend.h"

namespace autofocus::cuda {

void fast_grad_input(const Inputs& in, const TensorArgument& grad_output, const TensorArgument& grad_input,
                     const Context& context) {
  const Plan plan = plan_all(in, Pass::kGradInput);
  if (in.scale.data == nullptr)
    fast_blend_pass<true, false>("fast_grad_input", plan, in, grad_output, grad_input, context);
  else
    fast_blend_pass<true, true>("fast_grad_input", plan, in, grad_output, grad_input, context);
}

}  // namespace autofocus::cuda
