// Gradient of the weight: dW_t = sum_k sum_p (a_k G)(p) x(p + r_k t)^T (docs/math.md, section 3).
//
// Here positions are what is summed over: operand b is the same windows, read the other way round, the three taps of a row
// next to each other; operand a is a_k G in registers, once for the three rows of taps of a plane. A block keeps to eight
// input and 64 output channels and holds all 27 taps' sums in registers while it goes through its tiles; weight_sum.h adds
// the sums of all blocks. With a branch scale, or a G for each branch, the sums are kept apart by branch, one launch each.
#include "../weight_sum.h"
#include "tile.h"

namespace autofocus::cuda {

constexpr int kGradWeightGroups = 2;               // warpgroups, each with half of a tile's planes
constexpr int kGradWeightThreads = kGradWeightGroups * kGroupThreads;
constexpr int kPlaneSteps = kTileY / 2;            // products of a plane: two rows of eight points each
constexpr int kBlockTiles = 4;                     // of 16 output channels, one a warp
constexpr int kPackThreads = 256;

struct GradWeightArguments {
  const unsigned char* points;  // packed input, [N, chunks, points]
  const unsigned char* gates;   // packed attention of the targets
  const uint4* grads;           // packed grad_output, [tiles, steps, output tiles, lane]
  int chunks, output_tiles;
  float* partial;  // [outputs rounded up to 16, chunks * 8, taps], for each split of each block
  int64_t split_size;
  Index3 kernel;
};

// grad_output as operand a, one thread a lane: rows are output channels, columns the 16 points of a step, zero outside.
__global__ __launch_bounds__(kPackThreads) void pack_grad_output(Lattice g, Strided<const uint16_t> grad_output,
                                                                int64_t outputs, int output_tiles, int64_t items,
                                                                uint4* packed) {
  const int64_t index = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (index >= items) return;
  int64_t rest = index;
  const int lane = int(rest % 32);
  rest /= 32;
  const int64_t output = rest % output_tiles * 16 + lane / 4;
  rest /= output_tiles;
  const int steps = g.tile_z * kPlaneSteps;
  const int step = int(rest % steps);
  const Tile tile = tile_at(g, rest / steps);
  uint32_t words[4];
  for (int i = 0; i < 4; ++i) {
    const int64_t o = output + 8 * (i % 2);
    uint32_t pair = 0;
    for (int e = 0; e < 2; ++e) {
      const Index3 p = target_position(g, tile, step / kPlaneSteps, step % kPlaneSteps * 2 + i / 2, lane % 4 * 2 + e);
      if (o < outputs && inside(p, g.target)) pair |= uint32_t(*grad_output.at(tile.n, o, p)) << (16 * e);
    }
    words[i] = pair;
  }
  packed[index] = {words[0], words[1], words[2], words[3]};
}

// One chunk of a pipeline's tiles, whichever tile it is.
struct CopyChunk {
  const unsigned char* points;
  int chunks, chunk;

  __device__ void operator()(const Lattice& g, const Tile& tile, const Int3& reach, int, int first, int last) const {
    CopyPoints{points, chunks}(g, tile, reach, chunk, first, last);
  }
};

// Grid (blocks, chunks of input channels, blocks of 64 output channels).
template <typename T>
__global__ __launch_bounds__(kGradWeightThreads, 1) void grad_weight_kernel(Lattice g, GradWeightArguments args) {
  const int group = threadIdx.x / kGroupThreads, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int output_tile = int(blockIdx.z) * kBlockTiles + warp;
  const int group_planes = g.tile_z / kGradWeightGroups;

  float sum[3][3][1][3][4];  // [tz, ty], then by tx
  for (auto& plane : sum)
    for (auto& row : plane) clear(row);
  const CopyChunk stage{args.points, args.chunks, int(blockIdx.y)};
  Pipeline<Readers::kAll, CopyChunk> pipeline(g, 1, stage);
  // The attention as [branch, point], so that two neighbours of one branch are one word.
  unsigned char* gates = shared_memory() + pipeline.behind();
  const int tile_points = g.tile_z * kTileY * kTileX;

  for (pipeline.start([] {}); pipeline.running(); pipeline.advance()) {
    for (int i = threadIdx.x; i < tile_points; i += kGradWeightThreads) {
      const Int3 point = {i / (kTileY * kTileX), i / kTileX % kTileY, i % kTileX};
      const uint2 packed = packed_attention(g, pipeline.tile(), args.gates, point);
#pragma unroll
      for (int k = 0; k < kLatticeBranches; ++k)
        reinterpret_cast<uint16_t*>(gates)[k * tile_points + i] = uint16_t((k < 2 ? packed.x : packed.y) >> (16 * (k % 2)));
    }
#pragma unroll
    for (int tz = 0; tz < 3; ++tz) {
      pipeline.enter(tz - 1);
      pipeline.ahead(tz - 1);
#pragma unroll 1
      for (int z = group * group_planes; z < (reads(g, tz - 1) ? (group + 1) * group_planes : 0); ++z) {
        uint4 grad[kPlaneSteps] = {};
        if (output_tile < args.output_tiles) {
          const int64_t step0 = (int64_t(pipeline.tile_number()) * g.tile_z + z) * kPlaneSteps;
#pragma unroll
          for (int step = 0; step < kPlaneSteps; ++step)
            grad[step] = args.grads[((step0 + step) * args.output_tiles + output_tile) * 32 + lane];
        }
#pragma unroll
        for (int k = 0; k < kLatticeBranches; ++k) {
          if (k >= g.K) break;
          uint32_t a[kPlaneSteps][4];
#pragma unroll
          for (int step = 0; step < kPlaneSteps; ++step) {
            const unsigned char* gate =
                gates + (k * tile_points + (z * kTileY + 2 * step) * kTileX + lane % 4 * 2) * int(sizeof(uint16_t));
            const uint32_t rows[2] = {*reinterpret_cast<const uint32_t*>(gate),
                                      *reinterpret_cast<const uint32_t*>(gate + kTileX * sizeof(uint16_t))};
            a[step][0] = multiply(grad[step].x, rows[0], T{});
            a[step][1] = multiply(grad[step].y, rows[0], T{});
            a[step][2] = multiply(grad[step].z, rows[1], T{});
            a[step][3] = multiply(grad[step].w, rows[1], T{});
          }
          const uint32_t plane = plane_of(g, z, tz - 1, k);
          begin_products();
#pragma unroll
          for (int step = 0; step < kPlaneSteps; ++step)
#pragma unroll
            for (int ty = 0; ty < 3; ++ty)
              window_product_over_points<T>(
                  sum[tz][ty], a[step],
                  {plane + 2 * step * kPitch + (ty - 1) * g.rate[k].y * kPitch - g.rate[k].x, kPitch, uint32_t(g.rate[k].x)});
          commit_products();
          wait_for_products<0>();
        }
      }
      for (auto& row : sum[tz]) wait_for_products<0>(row);
      pipeline.leave(tz - 1, [] {});
    }
  }

  if (output_tile >= args.output_tiles) return;
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
          const int64_t o = int64_t(output_tile) * 16 + lane / 4 + i / 2 * 8;
          const int64_t c = int64_t(blockIdx.y) * kChunk + lane % 4 * 2 + i % 2;
          partial[(o * inputs + c) * volume(args.kernel) + ravel(t, args.kernel)] = sum[tz][ty][0][tx][i];
        }
}

void fast_grad_weight(const Inputs& in, const TensorView& grad_output, const TensorView& grad_weight,
                      const TensorView& grad_scale, const Context& context) {
  const Problem& g = in.g;
  const Plan plan = plan_of(Pass::kGradWeight, in);
  const int chunks = num_chunks(g.C);
  const int output_tiles = static_cast<int>(ceil_div(g.O, 16));
  const int64_t output_blocks = ceil_div(output_tiles, kBlockTiles), tiles = num_tiles(plan.lattice);
  const int64_t items = tiles * (plan.lattice.tile_z * kPlaneSteps) * output_tiles * 32;
  uint4* grads = static_cast<uint4*>(context.scratch(items * int64_t(sizeof(uint4))));
  const unsigned char* points = pack_points(plan.lattice, in.input, g.C, kPointBytes, context);

  const bool by_branch = in.scale.data != nullptr || grad_output.k != 0;
  const int64_t wanted = ceil_div(plan.blocks, chunks * output_blocks), blocks = wanted < tiles ? wanted : tiles;
  const WeightPartials sums{nullptr, blocks * kGradWeightGroups, by_branch ? g.K : 1, output_tiles * 16,
                            int64_t(chunks) * kChunk};
  const int64_t branch_size = sums.outputs * sums.inputs * num_taps(g);
  float* partial = static_cast<float*>(context.scratch(sums.splits * sums.branches * branch_size * int64_t(sizeof(float))));
  for_16_bit(in.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t k = 0; k < sums.branches; ++k) {
      const Plan own = by_branch ? plan_of_branch(Pass::kGradWeight, in, k) : plan;
      TensorView attention = in.attention;
      if (by_branch) attention.data = static_cast<T*>(attention.data) + k * attention.c;
      const unsigned char* gates =
          pack_points(packing_of_target(own.lattice), attention, own.lattice.K, kGateBytes, context);
      Strided<const uint16_t> grad(grad_output);
      grad.data += k * grad.k;
      if (k == 0 || grad.k != 0)
        launch("pack_grad_output", &pack_grad_output, dim3(static_cast<unsigned int>(ceil_div(items, kPackThreads))),
               kPackThreads, 0, context.stream, plan.lattice, grad, g.O, output_tiles, items, grads);
      launch("fast_weight_partial", &grad_weight_kernel<T>,
             dim3(static_cast<unsigned int>(blocks), static_cast<unsigned int>(chunks),
                  static_cast<unsigned int>(output_blocks)),
             kGradWeightThreads, own.shared_bytes, context.stream, own.lattice,
             GradWeightArguments{points, gates, grads, chunks, output_tiles, partial + k * branch_size,
                                 sums.branches * branch_size, g.kernel});
    }
  });
  sum_weight_partials(in, {partial, sums.splits, sums.branches, sums.outputs, sums.inputs}, grad_weight, grad_scale,
                      context);
}

}  // namespace autofocus::cuda
