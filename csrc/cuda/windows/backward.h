// The passes of a backward, each on operands that hold what it reads: fast_backward wants and packs them.
#pragma once

#include "../weight_sum.h"
#include "plan.h"

namespace autofocus::cuda {

// Of a grad_output for each branch, or a gated one. Adds to grad_input if `adds`.
void launch_grad_input(const Plan& plan, const Inputs& in, const Operands& operands, const TensorView& grad_input,
                       bool adds, const Context& context);

void launch_grad_attention(const Plan& plan, const Inputs& in, const Operands& operands,
                           const TensorView& grad_attention, const Context& context);

Work grad_weight_work(const Plan& plan, const Problem& g, DType dtype);
// What the weight's pass leaves of the work of a part for sum_weight_partials; by branch with a branch scale or a
// grad_output for each branch.
WeightPartials weight_partials_of(const Work& work, const Problem& g, DType dtype, bool by_branch);
// Fills them with the sums of a part, or adds those if `adds`; they lie in the operands' scratch memory. With
// `by_branch` grad_output is one for each branch.
void launch_grad_weight(const Inputs& in, bool by_branch, const Part& part, const Operands& operands,
                        const WeightPartials& sums, bool adds, const Context& context);

}  // namespace autofocus::cuda
