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
  Plan input_plan{}, attention_plan{};
  std::vector<Work> passes;
  Operands operands(in, common_step(in.g));
  operands.want_grad_output(grad_output);
  if (wants_input) {
    input_plan = plan_of(Pass::kGradInput, in);
    passes.push_back(work_of(input_plan, ceil_div(in.g.C, 8 * input_plan.tiles)));
    operands.want_adjoint_weight(input_plan.tiles);
    if (!by_branch) operands.want_attention();
  }
  if (wants_attention) {
    attention_plan = plan_of(Pass::kGradAttention, in);
    passes.push_back(work_of(attention_plan, 1));
    operands.want_input();
    operands.want_weight(attention_plan.tiles);
  }
  WeightPartials sums{};
  if (wants_weight) {
    const Plan weight_plan = plan_of(Pass::kGradWeight, in);
    passes.push_back(grad_weight_work(weight_plan, in.g, in.dtype));
    operands.want_input();
    operands.want_attention();
    sums = weight_partials_of(weight_plan, in.g, in.dtype, by_branch || in.scale.data != nullptr);
    operands.want_scratch(sums.splits * sums.branches * sums.outputs * sums.inputs * num_taps(in.g) *
                          int64_t(sizeof(float)));
  }

  const Split split = split_of(in.g, passes);
  for (int64_t i = 0; i < num_parts(split); ++i) {
    const Part part = part_of(in.g, split, i);
    const auto samples = [&](const TensorView& gradient) { return samples_from(gradient, part, in.dtype); };
    operands.pack(part, context);
    if (wants_input)
      launch_grad_input(plan_of_part(input_plan, Pass::kGradInput, part), in, by_branch, operands,
                        samples(gradients.input), adds, context);
    if (wants_attention)
      launch_grad_attention(plan_of_part(attention_plan, Pass::kGradAttention, part), in, operands,
                            samples(gradients.attention), context);
    if (wants_weight) launch_grad_weight(in, by_branch, part, operands, sums, i > 0, context);
  }
  if (wants_weight) {
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
