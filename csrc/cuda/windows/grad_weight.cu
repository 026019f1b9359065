// Gradient of the weight: dW_t = sum_k sum_p (a_k G)(p) x(p + r_k t)^T (docs/math.md, section 3).
//
// Here positions are what is summed over: operand b is the same windows, read the other way round, the three taps of a
// row next to each other; operand a is a_k G in registers, once for the three rows of taps of a plane. A block keeps to
// eight input and 64 output channels and holds all 27 taps' sums in registers while it goes through its tiles;
// weight_sum.h adds the sums of all blocks. With a branch scale, or a G for each branch, the sums are kept apart by
// branch, one launch each.
#include "backward.h"
#include "tile.h"

namespace autofocus::cuda {

constexpr int kGradWeightGroups = 2;  // warpgroups, each with half of a tile's planes
constexpr int kGradWeightThreads = kGradWeightGroups * kGroupThreads;
constexpr int kPlaneSteps = kTileY / 2;  // products of a plane: two rows of eight points each
constexpr int kBlockOutputs = 64;        // 16 a warp

struct GradWeightArguments {
  const unsigned char *points, *gates, *grads;  // Operands::input, attention and grad_output
  int chunks, output_chunks;
  int branch;         // of the gates, the lattice's first
  int grad_branches;  // of grad_output: 1, or K and `branch` is meant
  float* partial;     // [outputs rounded up to 16, chunks * 8, taps], for each split of each block
  int64_t split_size;
  int64_t outputs;
  Index3 kernel;
};

// One chunk of a pipeline's tiles, whichever tile it is.
struct CopyChunk {
  const unsigned char* points;
  int chunks, chunk;

  __device__ void operator()(const Lattice& lattice, const Tile& tile, const Int3& halo, int, int first,
                             int last) const {
    CopyPoints{points, chunks}(lattice, tile, halo, chunk, first, last);
  }
};

// grad_output of one plane of a tile as operand a, a product each: rows are this warp's 16 output channels, columns the
// 16 points of a step, zeros outside. A row of eight packed points is an 8x8 matrix with the channels as columns.
__device__ inline void load_grads(const Lattice& lattice, const Tile& tile, const GradWeightArguments& args,
                                  int warp_chunk, int z, uint32_t (&grads)[kPlaneSteps][4]) {
  const int lane = threadIdx.x % 32;
  const int k = args.grad_branches == 1 ? 0 : args.branch;
  const int64_t points = packed_target_points(lattice);
  const int64_t chunk = (tile.n * args.grad_branches + k) * args.output_chunks + warp_chunk;
#pragma unroll
  for (int step = 0; step < kPlaneSteps; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int y = 2 * step + i / 2, x = lane / 4;
      uint32_t pair = 0;
      if (warp_chunk + i % 2 < args.output_chunks && inside(target_position(lattice, tile, z, y, x), lattice.target)) {
        const int64_t point = (chunk + i % 2) * points + packed_target(lattice, tile, z, y, x);
        pair = *reinterpret_cast<const uint32_t*>(args.grads + point * kPointBytes + lane % 4 * 4);
      }
      grads[step][i] = transposed(pair);
    }
}

// Grid (blocks, chunks of input channels, blocks of kBlockOutputs output channels).
template <typename T>
__global__ __launch_bounds__(kGradWeightThreads, 1) void grad_weight_kernel(Lattice lattice, GradWeightArguments args) {
  const int group = threadIdx.x / kGroupThreads, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int output0 = int(blockIdx.z) * kBlockOutputs + 16 * warp;
  const int group_planes = lattice.tile_z / kGradWeightGroups;

  float sum[3][3][1][3][4];  // [tz, ty], then by tx
  for (auto& plane : sum)
    for (auto& row : plane) clear(row);
  const CopyChunk stage{args.points, args.chunks, int(blockIdx.y)};
  Pipeline<Readers::kAll, CopyChunk> pipeline(lattice, 1, stage);
  // The attention as [branch, point], so that two neighbours of one branch are one word.
  unsigned char* gates = shared_memory() + pipeline.behind();
  const int tile_points = lattice.tile_z * kTileY * kTileX;

  for (pipeline.start([] {}); pipeline.running(); pipeline.advance()) {
    for (int i = threadIdx.x; i < tile_points; i += kGradWeightThreads) {
      const Int3 point = {i / (kTileY * kTileX), i / kTileX % kTileY, i % kTileX};
      const uint2 packed = packed_attention(lattice, pipeline.tile(), args.gates, point);
#pragma unroll
      for (int k = 0; k < kLatticeBranches; ++k)
        reinterpret_cast<uint16_t*>(gates)[k * tile_points + i] =
            uint16_t((k < 2 ? packed.x : packed.y) >> (16 * (k % 2)));
    }
#pragma unroll
    for (int tz = 0; tz < 3; ++tz) {
      pipeline.enter(tz - 1);
      pipeline.ahead(tz - 1);
#pragma unroll 1
      for (int z = group * group_planes; z < (reads(lattice, tz - 1) ? (group + 1) * group_planes : 0); ++z) {
        uint32_t grads[kPlaneSteps][4];
        load_grads(lattice, pipeline.tile(), args, output0 / kChunk, z, grads);
#pragma unroll
        for (int k = 0; k < kLatticeBranches; ++k) {
          if (k >= lattice.K) break;
          uint32_t a[kPlaneSteps][4];
#pragma unroll
          for (int step = 0; step < kPlaneSteps; ++step) {
            const unsigned char* gate =
                gates + ((args.branch + k) * tile_points + (z * kTileY + 2 * step) * kTileX + lane % 4 * 2) *
                            int(sizeof(uint16_t));
            const uint32_t rows[2] = {*reinterpret_cast<const uint32_t*>(gate),
                                      *reinterpret_cast<const uint32_t*>(gate + kTileX * sizeof(uint16_t))};
#pragma unroll
            for (int i = 0; i < 4; ++i) a[step][i] = multiply(grads[step][i], rows[i / 2], T{});
          }
          const uint32_t plane = plane_of(lattice, z, tz - 1, k);
          begin_products();
#pragma unroll
          for (int step = 0; step < kPlaneSteps; ++step)
#pragma unroll
            for (int ty = 0; ty < 3; ++ty)
              window_product_over_points<T>(
                  sum[tz][ty], a[step],
                  {plane + 2 * step * kPitch + (ty - 1) * lattice.rate[k].y * kPitch - lattice.rate[k].x, kPitch,
                   uint32_t(lattice.rate[k].x)});
          commit_products();
          wait_for_products<0>();
        }
      }
      for (auto& row : sum[tz]) wait_for_products<0>(row);
      pipeline.leave(tz - 1, [] {});
    }
  }

  if (output0 >= args.outputs) return;
  const int64_t inputs = int64_t(args.chunks) * kChunk;
  float* partial = args.partial + (int64_t(blockIdx.x) * kGradWeightGroups + group) * args.split_size;
#pragma unroll
  for (int tz = 0; tz < 3; ++tz)
#pragma unroll
    for (int ty = 0; ty < 3; ++ty)
#pragma unroll
      for (int tx = 0; tx < 3; ++tx)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // On an axis of one tap those beside it are nobody's.
          const Index3 t = {args.kernel.z / 2 + tz - 1, args.kernel.y / 2 + ty - 1, args.kernel.x / 2 + tx - 1};
          if (!inside(t, args.kernel)) continue;
          const int64_t o = output0 + lane / 4 + i / 2 * 8;
          const int64_t c = int64_t(blockIdx.y) * kChunk + lane % 4 * 2 + i % 2;
          partial[(o * inputs + c) * volume(args.kernel) + ravel(t, args.kernel)] = sum[tz][ty][0][tx][i];
        }
}

WeightPartials weight_partials_of(const Plan& plan, const Problem& g, bool by_branch) {
  const int chunks = num_chunks(g.C);
  const int64_t output_blocks = ceil_div(g.O, kBlockOutputs), tiles = num_tiles(plan.lattice);
  const int64_t wanted = ceil_div(plan.blocks, chunks * output_blocks), blocks = wanted < tiles ? wanted : tiles;
  return {nullptr, blocks * kGradWeightGroups, by_branch ? g.K : 1, ceil_div(g.O, 16) * 16, int64_t(chunks) * kChunk};
}

void launch_grad_weight(const Plan& plan, const Inputs& in, bool by_branch, const Operands& operands,
                        const WeightPartials& sums, float* partial, const Context& context) {
  const Problem& g = in.g;
  const dim3 grid(static_cast<unsigned int>(sums.splits / kGradWeightGroups),
                  static_cast<unsigned int>(num_chunks(g.C)), static_cast<unsigned int>(ceil_div(g.O, kBlockOutputs)));
  const int chunks = num_chunks(g.O), grads = by_branch ? int(g.K) : 1;
  const int64_t branch_size = sums.outputs * sums.inputs * num_taps(g);
  for_16_bit(in.dtype, [&](auto element) {
    using T = decltype(element);
    for (int k = 0; k < sums.branches; ++k) {
      const Plan own = sums.branches == 1 ? plan : plan_of_branch(Pass::kGradWeight, in, k);
      launch(
          "fast_weight_partial", &grad_weight_kernel<T>, grid, kGradWeightThreads, own.shared_bytes, context.stream,
          own.lattice,
          GradWeightArguments{operands.input(), operands.attention(), operands.grad_output(), num_chunks(g.C), chunks,
                              k, grads, partial + k * branch_size, sums.branches * branch_size, g.O, g.kernel});
    }
  });
}

}  // namespace autofocus::cuda
