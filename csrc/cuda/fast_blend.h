// Blend, then project, on staged tiles: the fast forward, and, run backwards, the fast gradient of the input.
//
// A warp owns 32 target points, four rows of eight. A lane holds two channels of four of them: the layout of MMA operand a,
// so a blended value goes from its register straight into the tensor cores. One accumulator serves all branches.
#pragma once

#include "fast.h"

namespace autofocus::cuda {

// The forward's blend cannot have a branch scale (fast_branches.cu). kBranchAdjoint: each branch has a source of its
// own and no attention, so nothing is blended; the accumulator goes through the branches one after another.
enum class Blend { kForward, kAdjoint, kScaledAdjoint, kBranchAdjoint };

template <typename T>
struct BlendArguments {
  const unsigned char* points;  // packed source, [N, chunks, points] or [N, K, chunks, points]
  const unsigned char* gates;   // packed attention: of the targets, or in the adjoint of the sources
  const uint2* weight;          // pack_blend_weight
  int chunks;
  int64_t targets;
  Strided<const T> shift;  // forward only
  Strided<const T> scale;  // kScaledAdjoint only
  int64_t sources;
  Strided<T> target;
};

// Grid (blocks, blocks of 8 * kTargetTiles target channels).
template <typename T, int kTargetTiles, Blend kBlend>
__global__ __launch_bounds__(kMaxThreads, 1) void fast_blend(Lattice g, BlendArguments<T> args) {
  constexpr bool kScaled = kBlend == Blend::kScaledAdjoint, kByBranch = kBlend == Blend::kBranchAdjoint;
  constexpr bool kSourceGates = kBlend == Blend::kAdjoint || kScaled;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int x = lane / 4, channels = lane % 4 * 2;  // this lane's column, and the first of its two channels
  const int z = warp / 2, y0 = warp % 2 * kRowsPerWarp;
  const int centre = centre_point(g, y0, x);
  const int64_t target0 = int64_t(blockIdx.y) * (8 * kTargetTiles);
  const uint2* weight = args.weight + int64_t(blockIdx.y) * args.chunks * (3 * kPlanePairs * kTargetTiles * 32) + lane;

  float sum[2][kTargetTiles][4];
  float a[kRowsPerWarp][kLatticeBranches];
  const int chunks = kByBranch ? g.K * args.chunks : args.chunks;
  Pipeline<kSourceGates> pipeline(g, args.points, chunks, 0, chunks, args.gates, blockIdx.x, gridDim.x);
  for (pipeline.start(); pipeline.running(); pipeline.advance()) {
    if (pipeline.chunk() == 0) {
      for (auto& tile : sum)
        for (auto& fragment : tile)
          for (float& value : fragment) value = 0.0f;
      if (kBlend == Blend::kForward) load_attention<T>(g, pipeline.tile(), args.gates, z, y0, x, a);
    }
    float2 scale[kLatticeBranches];  // of this lane's two source channels
    if (kScaled) {
      const int64_t source = int64_t(pipeline.chunk()) * kChunk + channels;
#pragma unroll
      for (int k = 0; k < kLatticeBranches; ++k) {
        scale[k].x = k < g.K && source < args.sources ? branch_value(args.scale, k, source) : 0.0f;
        scale[k].y = k < g.K && source + 1 < args.sources ? branch_value(args.scale, k, source + 1) : 0.0f;
      }
    }
    const int first_branch = kByBranch ? pipeline.chunk() / args.chunks : 0;
    const uint2* chunk_weight =
        weight + int64_t(pipeline.chunk() - first_branch * args.chunks) * (3 * kPlanePairs * kTargetTiles * 32);
#pragma unroll 1
    for (int tz = -1; tz <= 1; ++tz) {
      pipeline.enter(tz);
      // Where this lane's first point lies through tap (tz, 0, 0) of each branch.
      const unsigned char* from[kLatticeBranches];
      const unsigned char* gate[kLatticeBranches];
#pragma unroll
      for (int k = 0; k < (kByBranch ? 1 : kLatticeBranches); ++k) {
        const int plane = tap_plane(g, z, tz, first_branch + k);
        from[k] = pipeline.points() + (slot(g, plane) * plane_size(g) + centre) * kPointBytes + channels * 2;
        if (kSourceGates) gate[k] = pipeline.gates() + (plane * plane_size(g) + centre) * kGateBytes + k * 2;
      }
#pragma unroll 1
      for (int step = 0; step < kPlanePairs; ++step) {
        const uint2* step_weight = chunk_weight + ((tz + 1) * kPlanePairs + step) * (kTargetTiles * 32);
        // Those asked for before the blend arrive behind it; the adjoint's blend leaves no registers for them.
        constexpr int kEarly = kSourceGates ? 0 : 4;
        uint2 b[kTargetTiles];
#pragma unroll
        for (int tile = 0; tile < kEarly; ++tile) b[tile] = step_weight[tile * 32];
        uint32_t blended[2][4];  // MMA operand a of rows 0, 1 and of rows 2, 3
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int tap = 2 * step + half;
          if constexpr (kByBranch) {
#pragma unroll
            for (int r = 0; r < kRowsPerWarp; ++r)
              blended[r / 2][2 * half + r % 2] =
                  tap < kPlaneTaps ? load_shared<uint32_t>(from[0] + g.tap_points[tap][first_branch] * kPointBytes +
                                                           r * (kPitch * kPointBytes))
                                   : 0u;
            continue;
          }
          float2 u[kRowsPerWarp] = {};
          const auto add_branch = [&](int k) {
            const int shift = g.tap_points[tap][k];
#pragma unroll
            for (int r = 0; r < kRowsPerWarp; ++r) {
              const float2 value = unpack(
                  load_shared<uint32_t>(from[k] + shift * kPointBytes + r * (kPitch * kPointBytes)), T{});
              const float w =
                  kSourceGates ? to_float(load_shared<T>(gate[k] + shift * kGateBytes + r * (kPitch * kGateBytes)))
                               : a[r][k];
              u[r].x += kScaled ? w * scale[k].x * value.x : w * value.x;
              u[r].y += kScaled ? w * scale[k].y * value.y : w * value.y;
            }
          };
          if (tap < kPlaneTaps) for_branches(g.K, add_branch);
#pragma unroll
          for (int r = 0; r < kRowsPerWarp; ++r) blended[r / 2][2 * half + r % 2] = pack(u[r].x, u[r].y, T{});
        }
#pragma unroll
        for (int tile = kEarly; tile < kTargetTiles; ++tile) b[tile] = step_weight[tile * 32];
#pragma unroll
        for (int tile = 0; tile < kTargetTiles; ++tile) {
          mma<T>(sum[0][tile], blended[0], b[tile]);
          mma<T>(sum[1][tile], blended[1], b[tile]);
        }
      }
      pipeline.leave(tz);
    }
    if (!pipeline.last_chunk()) continue;
    store_targets<kBlend == Blend::kForward>(g, pipeline.tile(), args.target, args.targets, target0, z, y0, x, channels,
                                             sum, args.shift, a);
  }
}

template <typename T, int kTargetTiles, Blend kBlend>
void launch_blend(const char* name, const Plan& plan, const Inputs& in, const TensorView& source,
                  const TensorView& target, const Context& context) {
  const Problem& g = in.g;
  constexpr bool kAdjoint = kBlend != Blend::kForward;
  const int64_t sources = kAdjoint ? g.O : g.C, targets = kAdjoint ? g.C : g.O;
  const unsigned char* gates = nullptr;
  if (kBlend != Blend::kBranchAdjoint)
    gates = pack_points(kAdjoint ? plan.lattice : packing_of_target(plan.lattice), in.attention, g.K, kGateBytes,
                        context);
  const BlendArguments<T> args{pack_points(plan.lattice, source, sources, kPointBytes, context),
                               gates,
                               pack_blend_weight(in, kAdjoint, kTargetTiles, context),
                               num_chunks(sources),
                               targets,
                               Strided<const T>(in.shift),
                               Strided<const T>(in.scale),
                               sources,
                               Strided<T>(target)};
  launch(name, &fast_blend<T, kTargetTiles, kBlend>, target_grid(plan, targets, 8 * kTargetTiles), plan.threads,
         plan.shared_bytes, context.stream, plan.lattice, args);
}

// Target channels go by 32 or by 64; with more than that the blend is repeated for every 64.
template <Blend kBlend>
void fast_blend_pass(const char* name, const Plan& plan, const Inputs& in, const TensorView& source,
                     const TensorView& target, const Context& context) {
  for_16_bit(in.dtype, [&](auto element) {
    using T = decltype(element);
    if ((kBlend == Blend::kForward ? in.g.O : in.g.C) <= 32)
      launch_blend<T, 4, kBlend>(name, plan, in, source, target, context);
    else
      launch_blend<T, 8, kBlend>(name, plan, in, source, target, context);
  });
}

}  // namespace autofocus::cuda
