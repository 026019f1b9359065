// The backward of the fast tier: slice by slice and part by part it packs operands and runs the passes that were asked
// for, one after the other in the same scratch memory.
#include "backward.h"

namespace autofocus::cuda {

namespace {

// The backward of one slice. `adds`: gradients that sum over branches are added to those of the slices before.
void backward_slice(const Inputs& in, const TensorView& grad_output, const Gradients& gradients, bool adds,
                    const Context& context) {
  const bool by_branch = grad_output.k != 0, wants_input = gradients.input.data != nullptr,
             wants_attention = gradients.attention.data != nullptr,
             wants_weight = gradients.weight.data != nullptr || gradients.scale != nullptr;
  // The gradient of the input reads a_k G of every branch, which is large and which no other pass reads. So it runs
  // first, in parts of its own; the operands of the other passes then overwrite its own. With a G for each branch, all
  // passes share one set of operands.
  const bool input_first = wants_input && !by_branch;
  const Int3 step = common_step(in.g);
  Operands gated(in, step), shared(in, step);
  Operands& of_input = input_first ? gated : shared;
  std::vector<Work> passes;
  Split input_split{};
  Plan input_plan{}, attention_plan{};
  if (wants_input) {
    input_plan = plan_of(Pass::kGradInput, in);
    const Work work = work_of_multiprocessors(input_plan, ceil_div(in.g.C, 8 * input_plan.tiles));
    if (input_first)
      input_split =
          split_in_slabs(in.g, input_plan.lattice, work, in.g.K, kForMemory);  // in K parts a_k G is as large as G
    else
      passes.push_back(work);
    of_input.want_grad_output(grad_output, input_first);
    of_input.want_adjoint_weight(input_plan.tiles);
  }
  if (wants_attention) {
    attention_plan = plan_of(Pass::kGradAttention, in);
    passes.push_back(work_of_multiprocessors(attention_plan, 1));
    shared.want_grad_output(grad_output, false);
    shared.want_input();
    shared.want_weight(attention_plan.tiles);
  }
  Work weight_work{};
  if (wants_weight) {
    weight_work = grad_weight_work(plan_of(Pass::kGradWeight, in), in.g, in.dtype);
    passes.push_back(weight_work);
    shared.want_grad_output(grad_output, false);
    shared.want_input();
    shared.want_attention();
  }

  const Split shared_split = split_of(in.g, passes, kForMemory);
  WeightPartials sums{};
  if (wants_weight) {
    weight_work.tiles = ceil_div(weight_work.tiles, num_parts(shared_split));
    sums = weight_partials_of(weight_work, in.g, in.dtype, by_branch || in.scale.data != nullptr);
    shared.want_scratch(sums.splits * sums.branches * sums.outputs * sums.inputs * num_taps(in.g) *
                        int64_t(sizeof(float)));
  }
  const int64_t of_gated = input_first ? gated.bytes(input_split) : 0,
                of_shared = passes.empty() ? 0 : shared.bytes(shared_split);
  void* memory = context.scratch(of_gated > of_shared ? of_gated : of_shared);
  const auto run_input = [&](const Part& part) {
    launch_grad_input(plan_of_part(input_plan, Pass::kGradInput, part), in, of_input,
                      samples_from(gradients.input, part, in.dtype), adds, context);
  };
  for (int64_t i = 0; i < (input_first ? num_parts(input_split) : 0); ++i) {
    const Part part = part_of(in.g, input_split, i);
    gated.pack(part, memory, context);
    run_input(part);
  }
  for (int64_t i = 0; i < (passes.empty() ? 0 : num_parts(shared_split)); ++i) {
    const Part part = part_of(in.g, shared_split, i);
    shared.pack(part, memory, context);
    if (wants_input && !input_first) run_input(part);
    if (wants_attention)
      launch_grad_attention(plan_of_part(attention_plan, Pass::kGradAttention, part), in, shared,
                            samples_from(gradients.attention, part, in.dtype), context);
    if (wants_weight) launch_grad_weight(in, by_branch, part, shared, sums, i > 0, context);
  }
  if (wants_weight) {
    sums.data = shared.scratch();
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
