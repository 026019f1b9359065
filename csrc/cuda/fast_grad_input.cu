// Gradient of the input, fast tier: the forward's blend run backwards (docs/math.md, section 3).
#include "fast_blend.h"

namespace autofocus::cuda {

void fast_grad_input(const Inputs& in, const TensorView& grad_output, const TensorView& grad_input,
                     const Context& context) {
  const Plan plan = plan_all(in, grad_output.k == 0 ? Pass::kGradInput : Pass::kBranchGradInput);
  if (grad_output.k != 0)
    fast_blend_pass<Blend::kBranchAdjoint>("fast_branch_grad_input", plan, in, grad_output, grad_input, context);
  else if (in.scale.data == nullptr)
    fast_blend_pass<Blend::kAdjoint>("fast_grad_input", plan, in, grad_output, grad_input, context);
  else
    fast_blend_pass<Blend::kScaledAdjoint>("fast_grad_input", plan, in, grad_output, grad_input, context);
}

}  // namespace autofocus::cuda
