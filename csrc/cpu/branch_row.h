// One row of voxels of one branch: a_k (s_k y_k + h_k) and its gradients, for branch mode and for batch-normalised
// branches.
#pragma once

#include "simd.h"

namespace autofocus {
namespace AUTOFOCUS_ISA {

// y_k [x][width], a_k [x], s_k and h_k [width] of a row of `count` voxels.
template <typename A>
struct BranchRow {
  const A *values, *attention, *scale, *shift;
  int64_t count, width;
};

// sum(p) += a_k(p) (s_k y_k(p) + h_k), or = where `first`.
template <typename A>
void add_branch(const BranchRow<A>& row, bool first, A* sum) {
  using V = Vec<A>;
  const auto [values, attention, scale, shift, count, width] = row;
  for (int64_t p = 0; p < count; ++p)
    for (int64_t v = 0; v < width; v += V::kLanes) {
      const auto branch = V::load(scale + v) * V::load(values + p * width + v) + V::load(shift + v);
      const auto term = V::broadcast(attention[p]) * branch;
      V::store(sum + p * width + v, first ? term : V::load(sum + p * width + v) + term);
    }
}

// What is wanted of a row; the rest is null.
template <typename A>
struct BranchRowGradients {
  A* attention;  // [x]
  A *scale, *shift;
};

// da_k(p) = sum_o G (s_k y_k + h_k), and over the row ds_k += a_k G (y_k - mean_k) and dh_k += a_k G.
template <typename A>
void differentiate_branch(const BranchRow<A>& row, const A* grad_output, const A* mean,
                          const BranchRowGradients<A>& gradients) {
  using V = Vec<A>;
  const auto [values, attention, scale, shift, count, width] = row;
  const auto [grad_attention, grad_scale, grad_shift] = gradients;
  for (int64_t p = 0; p < count; ++p) {
    const auto a = V::broadcast(attention[p]);
    typename V::Native dot = {};
    for (int64_t v = 0; v < width; v += V::kLanes) {
      const auto gradient = V::load(grad_output + p * width + v), branch = V::load(values + p * width + v);
      const auto gated = a * gradient;
      if (grad_shift) V::store(grad_shift + v, V::load(grad_shift + v) + gated);
      if (grad_scale) V::store(grad_scale + v, V::load(grad_scale + v) + gated * (branch - V::load(mean + v)));
      dot += gradient * (V::load(scale + v) * branch + V::load(shift + v));
    }
    if (grad_attention) grad_attention[p] = V::sum(dot);
  }
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
