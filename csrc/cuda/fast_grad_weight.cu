// Gradient of the weight, fast tier: dW_t = sum_p G(p) u_t(p)^T with the forward's blend u_t (docs/math.md, section 3).
//
// Here positions are what is summed over, so the blend is MMA operand b: blended in the layout of the forward, then
// transposed in registers. A block keeps to eight input and 32 output channels and holds all 27 taps' sums in registers
// while it goes through its tiles; weight_sum.h adds the sums of all blocks. With a branch scale, or a G for each
// branch, the sums are kept apart by branch, one launch each.
#include "fast.h"
#include "weight_sum.h"

namespace autofocus::cuda {

constexpr int kOutputTiles = 2;            // MMA tiles of 16 output channels
constexpr int kPlaneSteps = kTileY / 2;    // MMA steps of a plane: two rows of eight points each
constexpr int kPackThreads = 256;

struct GradWeightArguments {
  const unsigned char* points;  // packed input, [N, chunks, points]
  const unsigned char* gates;   // packed attention of the targets
  const uint4* grads;           // packed grad_output, [tiles, steps, output tiles, lane]
  int chunks;
  float* partial;  // [outputs rounded up to 32, chunks * 8, 27], for each split of each block
  int64_t split_size;
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

// Grid (blocks, chunks of input channels, blocks of 32 output channels).
template <typename T>
__global__ __launch_bounds__(kWeightThreads, 1) void fast_weight_partial(Lattice g, GradWeightArguments args) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int x = lane / 4, channels = lane % 4 * 2;
  const int ty = warp / kWeightSplits, split = warp % kWeightSplits;
  const int output_tiles = int(gridDim.z) * kOutputTiles;

  float sum[3][3][kOutputTiles][4] = {};  // [tz, tx]
  Pipeline<false> pipeline(g, args.points, args.chunks, blockIdx.y, 1, nullptr, blockIdx.x, gridDim.x);
  for (pipeline.start(); pipeline.running(); pipeline.advance()) {
    share_attention(g, pipeline.tile(), args.gates, pipeline.behind());
#pragma unroll
    for (int tz = 0; tz < 3; ++tz) {
      pipeline.enter(tz - 1);
#pragma unroll 1
      for (int z = split * g.tile_z / kWeightSplits; z < (split + 1) * g.tile_z / kWeightSplits; ++z) {
        const unsigned char* from[kLatticeBranches];
#pragma unroll
        for (int k = 0; k < kLatticeBranches; ++k)
          from[k] = pipeline.points() +
                    (slot(g, tap_plane(g, z, tz - 1, k)) * plane_size(g) + centre_point(g, 0, x)) * kPointBytes +
                    channels * 2;
#pragma unroll 1
        for (int step = 0; step < kPlaneSteps; ++step) {
          const unsigned char* gate = pipeline.behind() + ((z * kTileY + 2 * step) * kTileX + x) * kGateBytes;
          float a[2][kLatticeBranches];
#pragma unroll
          for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int k = 0; k < kLatticeBranches; ++k)
              a[r][k] = to_float(load_shared<T>(gate + r * (kTileX * kGateBytes) + k * 2));
          const int64_t grad_step = pipeline.tile_number() * (g.tile_z * kPlaneSteps) + z * kPlaneSteps + step;
          uint32_t grad[kOutputTiles][4];
#pragma unroll
          for (int tile = 0; tile < kOutputTiles; ++tile) {
            const uint4 word = args.grads[(grad_step * output_tiles + blockIdx.z * kOutputTiles + tile) * 32 + lane];
            grad[tile][0] = word.x;
            grad[tile][1] = word.y;
            grad[tile][2] = word.z;
            grad[tile][3] = word.w;
          }
#pragma unroll
          for (int tx = 0; tx < 3; ++tx) {
            float2 u[2] = {};
            for_branches(g.K, [&](int k) {
              const int shift = g.tap_points[ty * 3 + tx][k] + 2 * step * kPitch;
#pragma unroll
              for (int r = 0; r < 2; ++r) {
                const float2 value =
                    unpack(load_shared<uint32_t>(from[k] + shift * kPointBytes + r * (kPitch * kPointBytes)), T{});
                u[r].x += a[r][k] * value.x;
                u[r].y += a[r][k] * value.y;
              }
            });
            const uint2 b = {transpose_8x8(pack(u[0].x, u[0].y, T{})), transpose_8x8(pack(u[1].x, u[1].y, T{}))};
#pragma unroll
            for (int tile = 0; tile < kOutputTiles; ++tile) mma<T>(sum[tz][tx][tile], grad[tile], b);
          }
        }
      }
      pipeline.leave(tz - 1);
    }
  }

  const int64_t inputs = int64_t(args.chunks) * kChunk;
  float* partial = args.partial + (int64_t(blockIdx.x) * kWeightSplits + split) * args.split_size;
#pragma unroll
  for (int tz = 0; tz < 3; ++tz)
#pragma unroll
    for (int tx = 0; tx < 3; ++tx)
#pragma unroll
      for (int tile = 0; tile < kOutputTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t o = (int64_t(blockIdx.z) * kOutputTiles + tile) * 16 + x + i / 2 * 8;
          const int64_t c = int64_t(blockIdx.y) * kChunk + channels + i % 2;
          partial[(o * inputs + c) * 27 + tz * kPlaneTaps + ty * 3 + tx] = sum[tz][tx][tile][i];
        }
}

void fast_grad_weight(const Inputs& in, const TensorView& grad_output, const TensorView& grad_weight,
                      const TensorView& grad_scale, const Context& context) {
  const Problem& g = in.g;
  const Plan plan = plan_all(in, Pass::kGradWeight);
  const int chunks = num_chunks(g.C);
  const int64_t output_blocks = ceil_div(g.O, 16 * kOutputTiles), tiles = num_tiles(plan.lattice);
  const int output_tiles = static_cast<int>(output_blocks) * kOutputTiles;
  const int64_t items = tiles * (plan.lattice.tile_z * kPlaneSteps) * output_tiles * 32;
  uint4* grads = static_cast<uint4*>(context.scratch(items * int64_t(sizeof(uint4))));
  const unsigned char* points = pack_points(plan.lattice, in.input, g.C, kPointBytes, context);

  const bool by_branch = in.scale.data != nullptr || grad_output.k != 0;
  const int64_t wanted = ceil_div(plan.blocks, chunks * output_blocks), blocks = wanted < tiles ? wanted : tiles;
  const WeightPartials sums{nullptr, blocks * kWeightSplits, by_branch ? g.K : 1, output_tiles * 16,
                            int64_t(chunks) * kChunk};
  const int64_t branch_size = sums.outputs * sums.inputs * 27;
  float* partial = static_cast<float*>(context.scratch(sums.splits * sums.branches * branch_size * int64_t(sizeof(float))));
  for_16_bit(in.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t k = 0; k < sums.branches; ++k) {
      const Plan own = by_branch ? plan_branch(in, Pass::kGradWeight, k) : plan;
      TensorView attention = in.attention;
      if (by_branch) attention.data = static_cast<T*>(attention.data) + k * attention.c;
      const unsigned char* gates =
          pack_points(packing_of_target(own.lattice), attention, own.lattice.K, kGateBytes, context);
      Strided<const uint16_t> grad(grad_output);
      grad.data += k * grad.k;
      if (k == 0 || grad.k != 0)
        launch("pack_grad_output", &pack_grad_output, dim3(static_cast<unsigned int>(ceil_div(items, kPackThreads))),
               kPackThreads, 0, context.stream, plan.lattice, grad, g.O, output_tiles, items, grads);
      launch("fast_weight_partial", &fast_weight_partial<T>,
             dim3(static_cast<unsigned int>(blocks), static_cast<unsigned int>(chunks),
                  static_cast<unsigned int>(output_blocks)),
             own.threads, own.shared_bytes, context.stream, own.lattice,
             GradWeightArguments{points, gates, grads, chunks, partial + k * branch_size, sums.branches * branch_size});
    }
  });
  sum_weight_partials(in, {partial, sums.splits, sums.branches, sums.outputs, sums.inputs}, grad_weight, grad_scale,
                      context);
}

}  // namespace autofocus::cuda
