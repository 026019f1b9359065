// The forward with a branch scale, fast tier: out = sum_k a_k (scale_k y_k + shift_k).
//
// The scale belongs to output channels, so branches cannot be blended before they are projected: K times the tensor core
// work. In turn the staged input is MMA operand a as it lies, with no conversion and no rounding. A branch lives in
// registers for the taps of one tz at a time, which are then scaled and added to the output's sum.
#include "fast_branches.h"

#include "fast.h"

namespace autofocus::cuda {

constexpr int kOutputTiles = 4;  // MMA tiles of eight output channels: a branch and the sum fit the registers

template <typename T>
struct BranchesArguments {
  const unsigned char* points;  // packed input, [N, chunks, points]
  const unsigned char* gates;   // packed attention of the targets
  const uint2* weight;          // pack_blend_weight
  int chunks;
  int64_t outputs;
  Strided<const T> scale, shift;
  Strided<T> output;
};

// Grid (blocks, blocks of 32 output channels).
template <typename T>
__global__ __launch_bounds__(kMaxThreads, 1) void fast_branches_kernel(Lattice g, BranchesArguments<T> args) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int x = lane / 4, channels = lane % 4 * 2;
  const int z = warp / 2, y0 = warp % 2 * kRowsPerWarp;
  const int centre = centre_point(g, y0, x);
  const int64_t output0 = int64_t(blockIdx.y) * (8 * kOutputTiles);
  const int outputs = args.outputs - output0 < 8 * kOutputTiles ? int(args.outputs - output0) : 8 * kOutputTiles;
  const uint2* weight = args.weight + int64_t(blockIdx.y) * args.chunks * (3 * kPlanePairs * kOutputTiles * 32) + lane;

  float sum[2][kOutputTiles][4];
  Pipeline<false> pipeline(g, args.points, args.chunks, 0, args.chunks, nullptr, blockIdx.x, gridDim.x);
  const unsigned char* gate = pipeline.behind() + ((z * kTileY + y0) * kTileX + x) * kGateBytes;  // of the first point
  for (pipeline.start(); pipeline.running(); pipeline.advance()) {
    if (pipeline.chunk() == 0) {
      for (auto& tile : sum)
        for (auto& fragment : tile)
          for (float& value : fragment) value = 0.0f;
      share_attention(g, pipeline.tile(), args.gates, pipeline.behind());
    }
    const uint2* chunk_weight = weight + int64_t(pipeline.chunk()) * (3 * kPlanePairs * kOutputTiles * 32);
#pragma unroll 1
    for (int tz = -1; tz <= 1; ++tz) {
      pipeline.enter(tz);
#pragma unroll 1
      for (int k = 0; k < g.K; ++k) {
        const unsigned char* from = pipeline.points() +
                                    (slot(g, tap_plane(g, z, tz, k)) * plane_size(g) + centre) * kPointBytes + channels * 2;
        float y[2][kOutputTiles][4] = {};
#pragma unroll 1
        for (int step = 0; step < kPlanePairs; ++step) {
          const uint2* step_weight = chunk_weight + ((tz + 1) * kPlanePairs + step) * (kOutputTiles * 32);
          uint2 b[kOutputTiles];
#pragma unroll
          for (int tile = 0; tile < kOutputTiles; ++tile) b[tile] = step_weight[tile * 32];
          uint32_t points[2][4] = {};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int tap = 2 * step + half;
            if (tap >= kPlaneTaps) break;
#pragma unroll
            for (int r = 0; r < kRowsPerWarp; ++r)
              points[r / 2][2 * half + r % 2] =
                  load_shared<uint32_t>(from + g.tap_points[tap][k] * kPointBytes + r * (kPitch * kPointBytes));
          }
#pragma unroll
          for (int tile = 0; tile < kOutputTiles; ++tile) {
            mma<T>(y[0][tile], points[0], b[tile]);
            mma<T>(y[1][tile], points[1], b[tile]);
          }
        }
        float a[kRowsPerWarp];
#pragma unroll
        for (int r = 0; r < kRowsPerWarp; ++r) a[r] = to_float(load_shared<T>(gate + r * (kTileX * kGateBytes) + k * 2));
#pragma unroll
        for (int tile = 0; tile < kOutputTiles; ++tile)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int channel = tile * 8 + channels + e;
            const float scale = channel < outputs ? branch_value(args.scale, k, output0 + channel) : 0.0f;
#pragma unroll
            for (int r = 0; r < kRowsPerWarp; ++r)
              sum[r / 2][tile][r % 2 * 2 + e] += a[r] * (scale * y[r / 2][tile][r % 2 * 2 + e]);
          }
      }
      pipeline.leave(tz);
    }
    if (!pipeline.last_chunk()) continue;
    // Not from shared memory: a faster warp may be writing the next tile's.
    float a[kRowsPerWarp][kLatticeBranches];
    load_attention<T>(g, pipeline.tile(), args.gates, z, y0, x, a);
    store_targets<true>(g, pipeline.tile(), args.output, args.outputs, output0, z, y0, x, channels, sum, args.shift, a);
  }
}

void fast_branches(const Inputs& in, const TensorView& output, const Context& context) {
  const Plan plan = plan_all(in, Pass::kForward);
  for_16_bit(in.dtype, [&](auto element) {
    using T = decltype(element);
    using Read = Strided<const T>;
    const BranchesArguments<T> args{pack_points(plan.lattice, in.input, in.g.C, kPointBytes, context),
                                    pack_points(packing_of_target(plan.lattice), in.attention, in.g.K, kGateBytes, context),
                                    pack_blend_weight(in, false, kOutputTiles, context),
                                    num_chunks(in.g.C),
                                    in.g.O,
                                    Read(in.scale),
                                    Read(in.shift),
                                    Strided<T>(output)};
    launch("fast_branches", &fast_branches_kernel<T>, target_grid(plan, in.g.O, 8 * kOutputTiles), plan.threads,
           plan.shared_bytes, context.stream, plan.lattice, args);
  });
}

}  // namespace autofocus::cuda
