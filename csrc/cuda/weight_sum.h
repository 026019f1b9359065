// The last step of the gradients of weight and branch scale in both tiers: adds up the partial sums of the blocks, in a
// fixed order, so that results repeat bit by bit.
//
// With M_kt = sum_p G(p) a_k(p) x(.)^T, dW_t = sum_k scale_k M_kt and dscale_k = sum_t <W_t, M_kt> (docs/math.md,
// section 3). So the gradient of the scale needs no pass over the volume of its own. Without a scale, the blocks
// already sum over the branches, unless each branch has its own G.
#pragma once

#include "kernels.h"

namespace autofocus::cuda {

// Partial sums [splits, branches, outputs, inputs, T] of the accumulator's type. `branches` is 1 where blocks sum over
// the branches. `outputs` and `inputs` may be rounded up from O and C; what lies beyond is never read.
struct WeightPartials {
  void* data;
  int64_t splits, branches, outputs, inputs;
};

// Either gradient may be null. With a branch scale partials.branches must be K, else it may be 1 or K. `adds`: adds to
// grad_weight instead of overwriting it.
void sum_weight_partials(const Inputs& in, const WeightPartials& partials, const TensorView& grad_weight,
                         const TensorView& grad_scale, bool adds, const Context& context);

}  // namespace autofocus::cuda
