// The passes of a backward, as fast_backward (backward.cu) calls them for each part: it has chosen the plan and packed
// the operands that the pass reads.
#pragma once

#include "../weight_sum.h"
#include "plan.h"

namespace autofocus::cuda {

// The operands' grad_output must be gated, or one for each branch. `adds`: adds to grad_input instead of overwriting
// it.
void launch_grad_input(const Plan& plan, const Inputs& in, const Operands& operands, const TensorView& grad_input,
                       bool adds, const Context& context);

void launch_grad_attention(const Plan& plan, const Inputs& in, const Operands& operands,
                           const TensorView& grad_attention, const Context& context);

Work grad_weight_work(const Plan& plan, const Problem& g, DType dtype);
// The sizes of the partial sums that the weight's pass leaves for sum_weight_partials, where each part has `work`. Sums
// are kept apart by branch if there is a branch scale or a grad_output for each branch.
WeightPartials weight_partials_of(const Work& work, const Problem& g, DType dtype, bool by_branch);
// Writes the partial sums of a part to sums.data, or adds them to what is there if `adds`.
// `by_branch`: the operands' grad_output is one for each branch.
void launch_grad_weight(const Inputs& in, bool by_branch, const Part& part, const Operands& operands,
                        const WeightPartials& sums, bool adds, const Context& context);

}  // namespace autofocus::cuda
