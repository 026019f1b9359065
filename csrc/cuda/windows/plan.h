// How a pass of the fast tier is launched: tile, width and shared memory (Plan), for a whole call, for a part or for
// one branch; and calls of more than four branches cut into slices.
#pragma once

#include <type_traits>

#include "operands.h"

namespace autofocus::cuda {

constexpr int kGroupThreads = 128;    // a warpgroup
constexpr int kGroupPlanes = 2;       // planes of a tile that a warpgroup computes, each an operand of 64 points
constexpr int kMaxThreads = 512;      // a warpgroup for every two planes of a tile of eight
constexpr int kGradWeightGroups = 2;  // warpgroups of grad_weight, each with half of a tile's planes
constexpr int kGradWeightThreads = kGradWeightGroups * kGroupThreads;  // leaves 255 registers a thread, the most
constexpr int kPointsPerLane = 4;                                      // two in each plane (Share)

// How a pass is launched.
struct Plan {
  Lattice lattice;
  int tiles;            // eights of target channels that a thread block computes: 2, 4, 5 or 8
  int threads;          // of a thread block
  int shared_bytes;     // dynamic, of a thread block
  int multiprocessors;  // of the device
  int blocks;           // thread blocks that all multiprocessors run at once
};

// Plans a pass for all branches and positions of `g`. Returns null, or the reason why the pass cannot run on the
// current device.
const char* make_plan(Pass pass, const Problem& g, DType dtype, Plan& plan);
// The same for a pass that fast_refusal has let pass; throws if it cannot run. With in.few_blocks it counts on no more
// than kFewMultiprocessors: then the blocks of a small problem too go from tile to tile, and it is cut into parts.
Plan plan_of(Pass pass, const Inputs& in);
constexpr int kFewMultiprocessors = 3;
// The plan for a part of the positions.
Plan plan_of_part(Plan plan, Pass pass, const Part& part);
// The plan of `count` branches from `first` on, with the step and tile_z of all branches.
Plan plan_of_branches(Pass pass, const Inputs& in, int64_t first, int64_t count);
// The plan of branch k alone for a part, which reads the operands packed for all.
Plan plan_of_branch(Pass pass, const Inputs& in, const Part& part, int64_t k);

// The work of a pass in which `target_blocks` blocks of target channels go through the same tiles.
Work work_of(const Plan& plan, int64_t target_blocks);
// The same, counting one thread block at a time for each multiprocessor: two share its tensor cores and take about as
// long as one after the other.
Work work_of_multiprocessors(const Plan& plan, int64_t target_blocks);

// A tensor from the first sample of a part on.
inline TensorView samples_from(const TensorView& tensor, const Part& part, DType dtype) {
  return advanced(tensor, part.first_sample * tensor.n, dtype);
}

// The slice of up to `most` branches from `first` on, as a problem of its own. A pass that sums over branches adds each
// slice to the result, which is rounded once for each slice.
Inputs slice_of(const Inputs& in, int64_t first, int64_t most = kLatticeBranches);

// A grid (thread blocks, blocks of target channels) that fills the device once and leaves no thread block without a
// tile.
inline dim3 grid_of(const Plan& plan, int64_t target_blocks) {
  return dim3(static_cast<unsigned int>(work_of(plan, target_blocks).at_once),
              static_cast<unsigned int>(target_blocks));
}

constexpr int kNarrowTiles = 5;  // the widest product (in eights of channels) where registers are short

// Calls function(std::integral_constant<int, tiles>), for the widths that warpgroup_mma (device.h) has.
template <typename Function>
void for_tiles(int tiles, Function&& function) {
  switch (tiles) {
    case 2: return function(std::integral_constant<int, 2>{});
    case 4: return function(std::integral_constant<int, 4>{});
    case 5: return function(std::integral_constant<int, 5>{});
    default: return function(std::integral_constant<int, 8>{});
  }
}

}  // namespace autofocus::cuda
