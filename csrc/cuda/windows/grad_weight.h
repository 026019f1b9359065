// Gradient of the weight: dW_t = sum_k sum_p (a_k G)(p) x(p + r_k t)^T (docs/math.md, section 3); what the kernels of
// either width of elements share.
//
// Here positions are what is summed over: operand b is the same windows, read the other way round; operand a is a_k G
// in registers. A block keeps to one chunk of input channels and some output channels and holds all 27 taps' sums in
// registers while it goes through its tiles; weight_sum.h adds the sums of all blocks. With a branch scale, or a G for
// each branch, the sums are kept apart by branch, one launch each.
#pragma once

#include "backward.h"
#include "tile.h"

namespace autofocus::cuda {

struct GradWeightArguments {
  Source source;                       // Operands::input
  const unsigned char *gates, *grads;  // Operands::attention and grad_output
  int output_chunks;
  int branch;         // of the gates, the lattice's first
  int grad_branches;  // of grad_output: 1, or K and `branch` is meant
  float* partial;     // [outputs rounded up to 16, chunks of input channels, taps], for each block
  int64_t split_size;
  bool adds;  // to what is there
  int64_t outputs;
  Index3 kernel;
};

// A kernel of grid (blocks, chunks of input channels, blocks of `outputs` output channels).
struct GradWeightKernel {
  void (*run)(Lattice, GradWeightArguments, SourcePlanes);
  int outputs;
};
GradWeightKernel grad_weight_tf32_kernel_of();

// The points of this block's chunk.
__device__ inline Source chunk_of_block(const Source& source) {
  return {source.points, source.held, int(blockIdx.y), 1};
}

// The weight is no operand here.
struct NoSlabs {
  __device__ void operator()(const Turn&, int, int) const {}
};

// The attention of a tile as [branch, point], so that neighbours of one branch lie side by side.
template <typename T>
__device__ inline void write_gates(const Lattice& lattice, const Tile& tile, const GradWeightArguments& args,
                                   T* gates) {
  const int tile_points = lattice.tile_z * kTileY * kTileX;
  for (int i = threadIdx.x; i < tile_points; i += kGradWeightThreads) {
    const Int3 point = {i / (kTileY * kTileX), i / kTileX % kTileY, i % kTileX};
    const Gates<T> packed = packed_attention<T>(lattice, tile, args.gates, point);
#pragma unroll
    for (int k = 0; k < kLatticeBranches; ++k) gates[k * tile_points + i] = reinterpret_cast<const T*>(packed.pairs)[k];
  }
}

// The packed grad_output under a column of a tile's points in y, the same plane and x, in a chunk of output channels.
class GradColumn {
 public:
  __device__ GradColumn(const Lattice& lattice, const Tile& tile, const GradWeightArguments& args, int chunk, int z,
                        int x)
      : left_(chunk < args.output_chunks && has_target(tile, z, 0, x) ? tile.target_left.y : 0),
        row_bytes_(int64_t(lattice.target_points.x) * kPointBytes) {
    const int64_t k = args.grad_branches == 1 ? 0 : args.branch;
    const int64_t plane = (tile.n * args.grad_branches + k) * args.output_chunks + chunk;
    points_ = args.grads + (plane * lattice.packed_targets + packed_target(lattice, tile, z, 0, x)) * kPointBytes;
  }

  // Word `word` of the point in row y, zero where there is none.
  __device__ uint32_t word(int y, int word) const {
    return y < left_ ? reinterpret_cast<const uint32_t*>(points_ + y * row_bytes_)[word] : 0u;
  }

 private:
  int left_;
  int64_t row_bytes_;
  const unsigned char* points_;
};

// Leaves the sum of tap (tz, ty, tx), each -1, 0 or 1; on an axis of one tap those beside it are nobody's.
__device__ inline void store_partial(const GradWeightArguments& args, float* partial, int64_t o, int64_t c,
                                     int64_t inputs, const Int3& tap, float sum) {
  const Index3 t = {args.kernel.z / 2 + tap.z, args.kernel.y / 2 + tap.y, args.kernel.x / 2 + tap.x};
  if (!inside(t, args.kernel)) return;
  float& to = partial[(o * inputs + c) * volume(args.kernel) + ravel(t, args.kernel)];
  to = args.adds ? to + sum : sum;
}

}  // namespace autofocus::cuda
