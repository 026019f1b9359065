// The backward of the fast tier: slice by slice and part by part it packs operands and runs the passes that were asked
// for, one after the other in the same scratch memory.
#include <algorithm>
#include <deque>

#include "backward.h"

namespace autofocus::cuda {

namespace {

Work grad_input_work(const Plan& plan, const Problem& g) {
  return work_of_multiprocessors(plan, ceil_div(g.C, 8 * plan.tiles));
}

// The gradient of the input from a_k G of up to `most` branches, which is large and which no other pass reads: a pass
// with operands and parts of its own, on the lattices of all branches.
class InputPass {
 public:
  InputPass(const Inputs& all, int64_t first, int64_t most, const TensorView& grad_output)
      : g_(all.g),
        in_(slice_of(all, first, most)),
        plan_(plan_of_branches(Pass::kGradInput, all, first, in_.g.K)),
        work_(grad_input_work(plan_, g_)),
        split_(split_in_slabs(g_, plan_.lattice, work_, in_.g.K, kForMemory)),  // in K parts a_k G is as large as G
        operands_(in_, g_) {
    operands_.want_grad_output(grad_output, true);
    operands_.want_adjoint_weight(plan_.tiles);
  }
  InputPass(const InputPass&) = delete;  // operands_ refers to in_ and g_

  // Whether a_k G is larger than G although there are tiles for more than one round.
  bool is_large() const { return num_parts(split_) < in_.g.K && work_.tiles > work_.at_once; }
  int64_t bytes() { return operands_.bytes(split_); }

  void run(const TensorView& grad_input, bool adds, void* memory, const Context& context) {
    for (int64_t i = 0; i < num_parts(split_); ++i) {
      const Part part = part_of(g_, split_, i);
      operands_.pack(part, memory, context);
      launch_grad_input(plan_of_part(plan_, Pass::kGradInput, part), in_, operands_,
                        samples_from(grad_input, part, in_.dtype), adds, context);
    }
  }

 private:
  const Problem g_;
  const Inputs in_;
  const Plan plan_;
  const Work work_;
  const Split split_;
  Operands operands_;
};

constexpr int64_t kFewBranches = 2;

// Makes the passes that add up the gradient of the input. There is one for all branches, unless its a_k G is large and
// takes more than `bytes`, which the other passes take: then there is one for every two branches, and one rounding
// more. These keep to the lattices of all branches: their own, if they have a larger common factor, would be more and
// emptier.
void plan_grad_input(const Inputs& in, const TensorView& grad_output, int64_t bytes, std::deque<InputPass>& passes) {
  passes.emplace_back(in, 0, in.g.K, grad_output);
  if (in.g.K <= kFewBranches || !passes[0].is_large() || passes[0].bytes() <= bytes) return;
  passes.clear();
  for (int64_t first = 0; first < in.g.K; first += kFewBranches)
    passes.emplace_back(in, first, kFewBranches, grad_output);
}

// The memory of a volume [N, C, *size], if it has no gaps and can hold floats.
int64_t bytes_for_floats(const TensorView& tensor, int64_t N, int64_t C, const Index3& size, DType dtype) {
  const int64_t last = (N - 1) * tensor.n + (C - 1) * tensor.c + (size.z - 1) * tensor.s.z + (size.y - 1) * tensor.s.y +
                       (size.x - 1) * tensor.s.x;
  const bool is_aligned = reinterpret_cast<uintptr_t>(tensor.data) % alignof(float) == 0;
  return is_aligned && last + 1 == N * C * volume(size) ? (last + 1) * element_size(dtype) : 0;
}

// The backward of one slice. `adds`: gradients that sum over branches are added to those of the slices before.
void backward_slice(const Inputs& in, const TensorView& grad_output, const Gradients& gradients, bool adds,
                    const Context& context) {
  const Problem& g = in.g;
  const bool by_branch = grad_output.k != 0, wants_input = gradients.input.data != nullptr,
             wants_attention = gradients.attention.data != nullptr,
             wants_weight = gradients.weight.data != nullptr || gradients.scale != nullptr;
  // With a G for each branch all passes share their operands. Otherwise the gradient of the input comes last, and its
  // operands overwrite those of the other passes.
  const bool input_last = wants_input && !by_branch, input_shares = wants_input && by_branch;
  Operands shared(in, g);
  std::vector<Work> works;
  Plan input_plan{}, attention_plan{};
  if (input_shares) {
    input_plan = plan_of(Pass::kGradInput, in);
    works.push_back(grad_input_work(input_plan, g));
    shared.want_grad_output(grad_output, false);
    shared.want_adjoint_weight(input_plan.tiles);
  }
  if (wants_attention) {
    attention_plan = plan_of(Pass::kGradAttention, in);
    works.push_back(work_of_multiprocessors(attention_plan, 1));
    shared.want_grad_output(grad_output, false);
    shared.want_input();
    shared.want_weight(attention_plan.tiles);
  }
  Work weight_work{};
  if (wants_weight) {
    weight_work = grad_weight_work(plan_of(Pass::kGradWeight, in), g, in.dtype);
    works.push_back(weight_work);
    shared.want_grad_output(grad_output, false);
    shared.want_input();
    shared.want_attention();
  }
  const Split split = split_of(g, works, kForMemory);
  WeightPartials sums{};
  if (wants_weight) {
    weight_work.tiles = ceil_div(weight_work.tiles, num_parts(split));
    sums = weight_partials_of(weight_work, g, in.dtype, by_branch || in.scale.data != nullptr);
    const int64_t bytes =
        sums.splits * sums.branches * sums.outputs * sums.inputs * num_taps(g) * int64_t(sizeof(float));
    // Memory of the gradient of the input serves while it has no other use.
    if (input_last && !adds && bytes <= bytes_for_floats(gradients.input, g.N, g.C, g.input, in.dtype))
      sums.data = gradients.input.data;
    else
      shared.want_scratch(bytes);
  }
  const int64_t of_shared = works.empty() ? 0 : shared.bytes(split);
  std::deque<InputPass> input_passes;
  if (input_last) plan_grad_input(in, grad_output, of_shared, input_passes);
  int64_t bytes = of_shared;
  for (InputPass& pass : input_passes) bytes = std::max(bytes, pass.bytes());
  void* memory = context.scratch(bytes);

  for (int64_t i = 0; i < (works.empty() ? 0 : num_parts(split)); ++i) {
    const Part part = part_of(g, split, i);
    shared.pack(part, memory, context);
    if (input_shares)
      launch_grad_input(plan_of_part(input_plan, Pass::kGradInput, part), in, shared,
                        samples_from(gradients.input, part, in.dtype), adds, context);
    if (wants_attention)
      launch_grad_attention(plan_of_part(attention_plan, Pass::kGradAttention, part), in, shared,
                            samples_from(gradients.attention, part, in.dtype), context);
    if (wants_weight) {
      if (sums.data == nullptr) sums.data = shared.scratch();
      launch_grad_weight(in, by_branch, part, shared, sums, i > 0, context);
    }
  }
  if (wants_weight) sum_weight_partials(in, sums, gradients.weight, {gradients.scale, g.O, 1, {}}, adds, context);
  for (InputPass& pass : input_passes) {
    pass.run(gradients.input, adds, memory, context);
    adds = true;
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
