// Gradient of the input in the simple tier: the blend of the forward run backwards (docs/math.md, section 3).
#include "blend.h"

namespace autofocus::cuda {

void simple_grad_input(const Inputs& in, const TensorView& grad_output, const TensorView& grad_input,
                       const Context& context) {
  launch_simple_blend<true>("simple_grad_input", in, grad_output, grad_input, context);
}

}  // namespace autofocus::cuda
