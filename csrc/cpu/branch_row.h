// One row of voxels of one branch: a_k (s_k y_k + h_k) and its gradients, for branch mode and for batch-normalised
// branches.
#pragma once

#include <algorithm>

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

// Voxels that are summed in the accumulator's type; their sums are added in double.
constexpr int64_t kVoxelsOfASum = 128;

// What is wanted of a row; the rest is null.
template <typename A>
struct BranchRowGradients {
  A* attention;  // [x]
  double *scale, *shift;
};

// da_k(p) = sum_o G (s_k y_k + h_k), and over the row ds_k += a_k G (y_k - mean_k) and dh_k += a_k G. `sums` is memory
// for 2 width numbers.
template <typename A>
void differentiate_branch(const BranchRow<A>& row, const A* grad_output, const A* mean,
                          const BranchRowGradients<A>& gradients, A* sums) {
  using V = Vec<A>;
  const auto [values, attention, scale, shift, count, width] = row;
  A *of_scale = sums, *of_shift = sums + width;
  for (int64_t first = 0; first < count; first += kVoxelsOfASum) {
    std::fill(sums, sums + 2 * width, A(0));
    for (int64_t p = first; p < std::min(first + kVoxelsOfASum, count); ++p) {
      const auto a = V::broadcast(attention[p]);
      typename V::Native dot = {};
      for (int64_t v = 0; v < width; v += V::kLanes) {
        const auto gradient = V::load(grad_output + p * width + v), branch = V::load(values + p * width + v);
        const auto gated = a * gradient;
        if (gradients.shift) V::store(of_shift + v, V::load(of_shift + v) + gated);
        if (gradients.scale) V::store(of_scale + v, V::load(of_scale + v) + gated * (branch - V::load(mean + v)));
        dot += gradient * (V::load(scale + v) * branch + V::load(shift + v));
      }
      if (gradients.attention) gradients.attention[p] = V::sum(dot);
    }
    for (int64_t lane = 0; lane < width; ++lane) {
      if (gradients.scale) gradients.scale[lane] += of_scale[lane];
      if (gradients.shift) gradients.shift[lane] += of_shift[lane];
    }
  }
}

}  // namespace AUTOFOCUS_ISA
}  // namespace autofocus
