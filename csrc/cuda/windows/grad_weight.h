// Gradient of the weight in the fast tier, dW_t = sum_k sum_p (a_k G)(p) x(p + r_k t)^T (docs/math.md, section 3): what
// the 16-bit kernel (grad_weight.cu) and the TF32 kernel (grad_weight_tf32.cu) share.
//
// Here the sum runs over positions. Operand b is the window of a tap, read transposed; operand a is a_k G, formed in
// registers. A thread block has one chunk of input channels and some output channels. It holds the sums of all 27 taps
// in registers while it goes through its tiles; weight_sum.h then adds up the sums of all thread blocks. With a branch
// scale, or a G for each branch, sums are kept apart by branch, with one launch for each.
#pragma once

#include "backward.h"
#include "tile.h"

namespace autofocus::cuda {

struct GradWeightArguments {
  Source source;                       // Operands::input
  const unsigned char *gates, *grads;  // Operands::attention and Operands::grad_output
  int output_chunks;                   // of grad_output
  int branch;                          // which of the packed gates the lattice's branch 0 has
  int grad_branches;                   // gradients in grad_output: 1, or K, of which `branch` is read
  float* partial;  // [splits][outputs rounded up to 16, input channels of all chunks, taps], a split each blockIdx.x
  int64_t split_size;  // elements from one split to the next
  bool adds;           // adds to what is there instead of overwriting it
  int64_t outputs;     // O
  Index3 kernel;
};

// A kernel with grid (splits, chunks of input channels, blocks of `outputs` output channels).
struct GradWeightKernel {
  void (*run)(Lattice, GradWeightArguments, SourcePlanes);
  int outputs;
};
GradWeightKernel grad_weight_tf32_kernel_of();

// Only the chunk of this thread block, so that a tile has one turn.
__device__ inline Source chunk_of_block(const Source& source) {
  return {source.points, source.held, int(blockIdx.y), 1};
}

// For Pipeline: there are no slabs to copy.
struct NoSlabs {
  __device__ void operator()(const Turn&, int, int) const {}
};

// Writes the attention of a tile to shared memory as [branch, point], so that a lane loads two neighbouring points of a
// branch at once. Zeros outside the target, so the rest of a border tile adds nothing.
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

// The packed grad_output of a column of tile points (given z and x, any y) in one chunk of output channels.
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

  // Word `word` (of four) of the point in row y; zero outside the target and beyond the last chunk.
  __device__ uint32_t word(int y, int word) const {
    return y < left_ ? reinterpret_cast<const uint32_t*>(points_ + y * row_bytes_)[word] : 0u;
  }

 private:
  int left_;  // rows that exist
  int64_t row_bytes_;
  const unsigned char* points_;
};

// Stores the sum of output channel o, input channel c (of `inputs`) and tap (tz, ty, tx), each in -1 .. 1. Taps outside
// the kernel, on an axis with one tap, are dropped.
__device__ inline void store_partial(const GradWeightArguments& args, float* partial, int64_t o, int64_t c,
                                     int64_t inputs, const Int3& tap, float sum) {
  const Index3 t = {args.kernel.z / 2 + tap.z, args.kernel.y / 2 + tap.y, args.kernel.x / 2 + tap.x};
  if (!inside(t, args.kernel)) return;
  float& to = partial[(o * inputs + c) * volume(args.kernel) + ravel(t, args.kernel)];
  to = args.adds ? to + sum : sum;
}

}  // namespace autofocus::cuda
