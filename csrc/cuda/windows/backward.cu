// A backward: the operands that its passes share are packed once, then the passes run one after the other.
#include "backward.h"

namespace autofocus::cuda {

namespace {

// Of at most kLatticeBranches branches. Gradients that sum over branches are added to what is there if `adds`.
void backward_slice(const Inputs& in, const TensorView& grad_output, const Gradients& gradients, bool adds,
                    const Context& context) {
  const bool by_branch = grad_output.k != 0, wants_input = gradients.input.data != nullptr,
             wants_attention = gradients.attention.data != nullptr,
             wants_weight = gradients.weight.data != nullptr || gradients.scale != nullptr;
  Plan input_plan{}, attention_plan{}, weight_plan{};
  Operands operands(in, common_step(in.g));
  operands.want_grad_output(grad_output);
  if (wants_input) {
    input_plan = plan_of(Pass::kGradInput, in);
    operands.want_adjoint_weight(input_plan.tiles);
    if (!by_branch) operands.want_attention();
  }
  if (wants_attention) {
    attention_plan = plan_of(Pass::kGradAttention, in);
    operands.want_input();
    operands.want_weight(attention_plan.tiles);
  }
  WeightPartials sums{};
  if (wants_weight) {
    weight_plan = plan_of(Pass::kGradWeight, in);
    operands.want_input();
    operands.want_attention();
    sums = weight_partials_of(weight_plan, in.g, in.dtype, by_branch || in.scale.data != nullptr);
    operands.want_scratch(sums.splits * sums.branches * sums.outputs * sums.inputs * num_taps(in.g) *
                          int64_t(sizeof(float)));
  }
  operands.pack(context);

  if (wants_input) launch_grad_input(input_plan, in, by_branch, operands, gradients.input, adds, context);
  if (wants_attention) launch_grad_attention(attention_plan, in, operands, gradients.attention, context);
  if (wants_weight) {
    launch_grad_weight(weight_plan, in, by_branch, operands, sums, static_cast<float*>(operands.scratch()), context);
    sums.data = operands.scratch();
    sum_weight_partials(in, sums, gradients.weight, {gradients.scale, in.g.O, 1, {}}, adds, context);
  }
}

}  // namespace

void fast_backward(const Inputs& in, const TensorView& grad_output, const Gradients& gradients,
                   const Context& context) {
  for (int64_t first = 0; first < in.g.K; first += kLatticeBranches) {
    Gradients own = gradients;
    own.attention = advanced(own.attention, first * own.attention.c, in.dtype);
    own.scale = advanced({own.scale, 0, 0, {}}, first * in.g.O, in.dtype).data;
    backward_slice(slice_of(in, first), advanced(grad_output, first * grad_output.k, in.dtype), own, first > 0,
                   context);
  }
}

}  // namespace autofocus::cuda
