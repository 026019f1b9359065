// Forward of the fast tier, without a branch scale, and of a branch alone.
#include "fast_blend.h"
#include "fast_branches.h"

namespace autofocus::cuda {

void fast_forward(const Inputs& in, const TensorView& output, const Context& context) {
  if (in.scale.data != nullptr) return fast_branches(in, output, context);
  fast_blend_pass<Blend::kForward>("fast_forward", plan_all(in, Pass::kForward), in, in.input, output, context);
}

void fast_branch(const Inputs& in, int64_t k, const TensorView& branch, const Context& context) {
  Inputs one = in;
  one.g = branch_problem(in.g, k);
  // A large dilation alone leaves lattices smaller than a tile.
  const bool together = fast_refusal(Pass::kForward, in.g, in.dtype) == nullptr;
  const Plan plan = together ? plan_branch(in, Pass::kForward, k) : plan_all(one, Pass::kForward);
  fast_blend_pass<Blend::kForward>("fast_branch", plan, one, one.input, branch, context);
}

}  // namespace autofocus::cuda
