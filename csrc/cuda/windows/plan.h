// The launch plan of the windows' passes, and the packing of their operands.
#pragma once

#include <type_traits>

#include "staging.h"

namespace autofocus::cuda {

constexpr int kGroupThreads = 128;  // a warpgroup
constexpr int kGroupPlanes = 2;     // of a tile, each an operand of 64 points: what a warpgroup multiplies
constexpr int kMaxThreads = 512;    // a warpgroup for every two planes of a tile of eight
constexpr int kSlabTaps = 10;       // of one tz: nine taps, two a product, the last one with nothing
constexpr int kPointsPerLane = 4;   // of two planes: the rows that a lane has of d

// Lattices, block and shared memory of a pass.
struct Plan {
  Lattice lattice;
  int tiles;  // target channels of a block, by eights
  int threads;
  int shared_bytes;
  int blocks;  // that run at once on the device
};

// The plan for all branches, or null and why the pass cannot run on the current device. With `branch` that of one branch
// alone, in the classes and tiles of all: operands packed for one serve the other.
const char* make_plan(Pass pass, const Problem& g, DType dtype, Plan& plan);
Plan plan_of(Pass pass, const Inputs& in);
Plan plan_of_branch(Pass pass, const Inputs& in, int64_t k);

// Chunks of channels, and what packing them takes.
inline int num_chunks(int64_t channels) { return static_cast<int>(ceil_div(channels, kChunk)); }

// source [N, channels, *] -> [N, chunks, points of all classes] of `bytes`, zeros beyond the source and the last
// channel. With a source for each of the lattice's K branches: [N, K, chunks, points].
const unsigned char* pack_points(const Lattice& g, const TensorView& source, int64_t channels, int bytes,
                                 const Context& context);
// grad_output times attention and branch scale, rounded once, as the source of each branch: [N, K, chunks, points].
const unsigned char* pack_scaled_grads(const Lattice& g, const Inputs& in, const TensorView& grad_output,
                                       const Context& context);
// The weight as operand b: [blocks of 8 tiles target channels, chunks, tz, kSlabTaps, 8 tiles] points of eight sources. The
// adjoint's sources are the weight's output channels.
const unsigned char* pack_weight(const Inputs& in, Direction direction, int tiles, const Context& context);

// Of a block of 8 kTiles target channels: the weight of one tz, and of a chunk.
template <int kTiles>
constexpr int kSlabBytes = kSlabTaps * 8 * kTiles * kPointBytes;
AUTOFOCUS_HD constexpr int chunk_weight_bytes(int tiles) { return 3 * kSlabTaps * 8 * tiles * kPointBytes; }

// Grid (blocks, blocks of target channels) that fills the device once, no block without a tile.
inline dim3 grid_of(const Plan& plan, int64_t target_blocks) {
  const int64_t tiles = num_tiles(plan.lattice), wanted = ceil_div(plan.blocks, target_blocks);
  return dim3(static_cast<unsigned int>(wanted < tiles ? wanted : tiles), static_cast<unsigned int>(target_blocks));
}

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
