// Gradient of the attention, fast tier (docs/math.md, section 3).
//
// g_t(p) = W_t^T G(p) comes out of the tensor cores in the layout in which the staged input is read, two channels of a
// point a lane, so its dot products with the input under each branch's tap are a blend turned around: as many loads, as
// many multiply-adds.
#include "fast.h"

namespace autofocus::cuda {

template <typename T>
struct GradAttentionArguments {
  const unsigned char* points;  // packed input, [N, chunks, points]
  const uint2* weight;          // [output blocks, chunks, taps, kSteps, lane]
  int chunks, output_blocks;
  int64_t outputs;
  Strided<const T> grad_output, shift;
  Strided<T> grad_attention;
};

// One thread a lane of operand b: rows are output channels, columns input channels.
__global__ __launch_bounds__(256) void pack_projection_weight(Strided<const uint16_t> weight, int64_t inputs,
                                                              int64_t outputs, int chunks, int steps, int64_t items,
                                                              uint2* packed) {
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (index >= items) return;
  int64_t rest = index;
  const int lane = int(rest % 32);
  rest /= 32;
  const int step = int(rest % steps);
  rest /= steps;
  const int tap = int(rest % 27);
  rest /= 27;
  const int64_t input = rest % chunks * kChunk + lane / 4;
  const int64_t output = (rest / chunks * steps + step) * 16 + lane % 4 * 2;
  const Index3 t = {tap / 9, tap / 3 % 3, tap % 3};
  uint32_t halves[2];
  for (int half = 0; half < 2; ++half) {
    uint32_t pair = 0;
    for (int e = 0; e < 2; ++e)
      if (input < inputs && output + 8 * half + e < outputs)
        pair |= uint32_t(*weight.at(output + 8 * half + e, input, t)) << (16 * e);
    halves[half] = pair;
  }
  packed[index] = {halves[0], halves[1]};
}

// G of this lane's points as operand a of MMA step `step`: outputs from `output0`, zero outside the target and beyond the
// last output. Adds <shift_k, G> to `sum`.
template <typename T>
__device__ inline void load_grad(const Lattice& g, const Tile& tile, const GradAttentionArguments<T>& args, int z, int y0,
                                 int x, int64_t output0, uint32_t (&grad)[2][4],
                                 float (&sum)[kRowsPerWarp][kLatticeBranches]) {
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const Index3 p = target_position(g, tile, z, y0 + r, x);
    const bool valid = inside(p, g.target);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float pair[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t o = output0 + 8 * half + e;
        pair[e] = valid && o < args.outputs ? to_float(*args.grad_output.at(tile.n, o, p)) : 0.0f;
        if (args.shift.data != nullptr && o < args.outputs) {
#pragma unroll
          for (int k = 0; k < kLatticeBranches; ++k)
            if (k < g.K) sum[r][k] += pair[e] * branch_value(args.shift, k, o);
        }
      }
      grad[r / 2][2 * half + r % 2] = pack(pair[0], pair[1], T{});
    }
  }
}

// kSteps: MMA steps of 16 output channels; more outputs than 16 * kSteps go through the tile again, block by block.
template <typename T, int kSteps>
__global__ __launch_bounds__(kMaxThreads, 1) void fast_grad_attention_kernel(Lattice g, GradAttentionArguments<T> args) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int x = lane / 4, channels = lane % 4 * 2;
  const int z = warp / 2, y0 = warp % 2 * kRowsPerWarp;
  const int centre = centre_point(g, y0, x);

  float sum[kRowsPerWarp][kLatticeBranches];
  uint32_t grad[kSteps][2][4];
  // The pipeline's chunks are the input's, once for every block of outputs.
  Pipeline<false> pipeline(g, args.points, args.chunks, 0, args.chunks * args.output_blocks, nullptr, blockIdx.x,
                           gridDim.x);
  for (pipeline.start(); pipeline.running(); pipeline.advance()) {
    const int output_block = pipeline.chunk() / args.chunks;
    if (pipeline.chunk() == 0)
      for (auto& row : sum)
        for (float& value : row) value = 0.0f;
    if (pipeline.chunk() % args.chunks == 0) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        load_grad(g, pipeline.tile(), args, z, y0, x, (int64_t(output_block) * kSteps + step) * 16 + channels, grad[step],
                  sum);
    }
    const uint2* weight = args.weight + int64_t(pipeline.chunk()) * (27 * kSteps * 32) + lane;
#pragma unroll 1
    for (int tz = -1; tz <= 1; ++tz) {
      pipeline.enter(tz);
      const unsigned char* from[kLatticeBranches];
#pragma unroll
      for (int k = 0; k < kLatticeBranches; ++k)
        from[k] = pipeline.points() +
                  (slot(g, tap_plane(g, z, tz, k)) * plane_size(g) + centre) * kPointBytes + channels * 2;
#pragma unroll 1
      for (int tap = 0; tap < kPlaneTaps; ++tap) {
        const uint2* tap_weight = weight + ((tz + 1) * kPlaneTaps + tap) * (kSteps * 32);
        float projected[2][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const uint2 b = tap_weight[step * 32];
          mma<T>(projected[0], grad[step][0], b);
          mma<T>(projected[1], grad[step][1], b);
        }
        for_branches(g.K, [&](int k) {
          const int shift = g.tap_points[tap][k];
#pragma unroll
          for (int r = 0; r < kRowsPerWarp; ++r) {
            const float2 value =
                unpack(load_shared<uint32_t>(from[k] + shift * kPointBytes + r * (kPitch * kPointBytes)), T{});
            sum[r][k] += projected[r / 2][r % 2 * 2] * value.x;
            sum[r][k] += projected[r / 2][r % 2 * 2 + 1] * value.y;
          }
        });
      }
      pipeline.leave(tz);
    }
    if (!pipeline.last_chunk()) continue;
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const Index3 p = target_position(g, pipeline.tile(), z, y0 + r, x);
      const bool valid = inside(p, g.target);
#pragma unroll
      for (int k = 0; k < kLatticeBranches; ++k) {
        // The four lanes of a point hold its eight channels.
        float total = sum[r][k] + shuffle_xor(sum[r][k], 1);
        total += shuffle_xor(total, 2);
        if (valid && k < g.K && lane % 4 == k) store(args.grad_attention.at(pipeline.tile().n, k, p), total);
      }
    }
  }
}

template <typename T, int kSteps>
void launch_grad_attention(const Plan& plan, const Inputs& in, const TensorArgument& grad_output,
                           const TensorArgument& grad_attention, const Context& context) {
  const Problem& g = in.g;
  const int chunks = num_chunks(g.C), output_blocks = static_cast<int>(ceil_div(g.O, 16 * kSteps));
  const int64_t items = int64_t(output_blocks) * chunks * 27 * kSteps * 32;
  uint2* weight = static_cast<uint2*>(context.scratch(items * int64_t(sizeof(uint2))));
  launch("pack_projection_weight", &pack_projection_weight, dim3(static_cast<unsigned int>(ceil_div(items, 256))), 256, 0,
         context.stream, Strided<const uint16_t>(in.weight), g.C, g.O, chunks, kSteps, items, weight);
  const GradAttentionArguments<T> args{pack_points(plan.lattice, in.input, g.C, kPointBytes, context),
                                       weight,
                                       chunks,
                                       output_blocks,
                                       g.O,
                                       Strided<const T>(grad_output),
                                       Strided<const T>(in.shift),
                                       Strided<T>(grad_attention)};
  const int64_t tiles = num_tiles(plan.lattice);
  const dim3 grid(static_cast<unsigned int>(plan.blocks < tiles ? plan.blocks : tiles));
  launch("fast_grad_attention", &fast_grad_attention_kernel<T, kSteps>, grid, plan.threads, plan.shared_bytes,
         context.stream, plan.lattice, args);
}

void fast_grad_attention(const Inputs& in, const TensorArgument& grad_output, const TensorArgument& grad_attention,
                         const Context& context) {
  Plan plan;
  if (const char* refusal = make_plan(in, Pass::kGradAttention, plan)) throw std::runtime_error(refusal);
  for_16_bit(in.dtype, [&](auto element) {
    using T = decltype(element);
    if (in.g.O <= 32)
      launch_grad_attention<T, 2>(plan, in, grad_output, grad_attention, context);
    else
      launch_grad_attention<T, 4>(plan, in, grad_output, grad_attention, context);
  });
}

}  // namespace autofocus::cuda
