// The launch plan of the windows' passes.
#pragma once

#include <type_traits>

#include "operands.h"

namespace autofocus::cuda {

constexpr int kGroupThreads = 128;    // a warpgroup
constexpr int kGroupPlanes = 2;       // of a tile, each an operand of 64 points: what a warpgroup multiplies
constexpr int kMaxThreads = 512;      // a warpgroup for every two planes of a tile of eight
constexpr int kGradWeightGroups = 2;  // warpgroups, each with half of a tile's planes
constexpr int kGradWeightThreads = kGradWeightGroups * kGroupThreads;  // all the registers of a multiprocessor
constexpr int kPointsPerLane = 4;                                      // of two planes: the rows that a lane has of d

// Lattices, block and shared memory of a pass.
struct Plan {
  Lattice lattice;
  int tiles;  // target channels of a block, by eights
  int threads;
  int shared_bytes;
  int multiprocessors;
  int blocks;  // that run at once on all of them
};

// The plan for all branches, or why the pass cannot run on the current device.
const char* make_plan(Pass pass, const Problem& g, DType dtype, Plan& plan);
Plan plan_of(Pass pass, const Inputs& in);
// A plan for a part of the positions.
Plan plan_of_part(Plan plan, Pass pass, const Part& part);
// That of one branch alone, in the classes and tiles of all: operands packed for one serve the other.
Plan plan_of_branch(Pass pass, const Inputs& in, const Part& part, int64_t k);

// `target_blocks` run through the same tiles.
Work work_of(const Plan& plan, int64_t target_blocks);
// Counted as one block a multiprocessor at a time: two share its tensor cores, and take about as long as one after the
// other.
Work work_of_multiprocessors(const Plan& plan, int64_t target_blocks);

// A tensor from the first sample of a part on.
inline TensorView samples_from(const TensorView& tensor, const Part& part, DType dtype) {
  return advanced(tensor, part.first_sample * tensor.n, dtype);
}

// A pass takes kLatticeBranches branches at once: these are the ones from `first` on, as a problem of their own, with
// lattices and operands of their own. What sums over branches is added up in the result, rounded once for each slice.
Inputs slice_of(const Inputs& in, int64_t first);

// Grid (blocks, blocks of target channels) that fills the device once, no block without a tile.
inline dim3 grid_of(const Plan& plan, int64_t target_blocks) {
  return dim3(static_cast<unsigned int>(work_of(plan, target_blocks).at_once),
              static_cast<unsigned int>(target_blocks));
}

constexpr int kNarrowTiles = 5;  // the most where registers are short

// function(std::integral_constant<int, tiles>) for the widths of a product that are written down (device.h).
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
