// Forward of the fast tier.
#include "fast_blend.h"

namespace autofocus::cuda {

void fast_forward(const Inputs& in, const TensorArgument& output, const Context& context) {
  Plan plan;
  if (const char* refusal = make_plan(in, Pass::kForward, plan)) throw std::runtime_error(refusal);
  fast_blend_pass<false>("fast_forward", plan, in, in.input, output, context);
}

}  // namespace autofocus::cuda
