// The last step of both tiers' gradients of the weight and of the branch scale: partial sums of blocks, added up.
//
// With M_kt = sum_p G(p) a_k(p) x(.)^T, dW_t = sum_k scale_k M_kt and dscale_k = sum_t <W_t, M_kt> (docs/math.md,
// section 3): the scale's gradient needs no pass over the volume of its own. Without a scale the blocks sum over the
// branches too, unless each has a G of its own. Partial sums are added in a fixed order, so results repeat bit by
// bit.
#pragma once

#include "kernels.h"

namespace autofocus::cuda {

// [splits, branches, outputs, inputs, T] of the accumulator's type; outputs and inputs may be rounded up from O and C.
struct WeightPartials {
  const void* data;
  int64_t splits, branches, outputs, inputs;
};

// Either gradient may be null. With a scale there must be K branches, else one or K. Adds to grad_weight if `adds`.
void sum_weight_partials(const Inputs& in, const WeightPartials& partials, const TensorView& grad_weight,
                         const TensorView& grad_scale, bool adds, const Context& context);

}  // namespace autofocus::cuda
