// Forward of the fast tier, without a branch scale.
#include "fast_blend.h"
#include "fast_branches.h"

namespace autofocus::cuda {

void fast_forward(const Inputs& in, const TensorArgument& output, const Context& context) {
  if (in.scale.data != nullptr) return fast_branches(in, output, context);
  fast_blend_pass<Blend::kForward>("fast_forward", plan_all(in, Pass::kForward), in, in.input, output, context);
}

}  // namespace autofocus::cuda
