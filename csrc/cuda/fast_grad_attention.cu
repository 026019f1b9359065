// Gradient of the attention, fast tier (docs/math.md, section 3).
//
// g_t(p) = W_t^T G(p) comes out of the tensor cores in the layout in which the staged input is read, two channels of a
// point a lane, so its dot products with the input under each branch's tap are a blend turned around: as many loads, as
// many multiply-adds. With a branch scale W_t^T (scale_k G) is another for every branch: one launch each, the scale folded
// into the weight.
#include "fast.h"

namespace autofocus::cuda {

// G is projected by the 27 taps of the weight and, as if it were one more, by the shift of every branch.
constexpr int kProjections = 28;
constexpr int kShift = 27;

template <typename T>
struct GradAttentionArguments {
  const unsigned char* points;  // packed input, [N, chunks, points]
  const uint2* weight;          // [output blocks, chunks, kProjections, kSteps, lane]
  const unsigned char* grads;   // packed grad_output, [N, output chunks, target points]
  int chunks, output_blocks, output_chunks;
  Strided<T> grad_attention;
};

// One thread a lane of operand b: rows are output channels, columns input channels, or branches from `first_branch` on.
// `scale` and `shift` [K, O] may be null; the scale is that of `first_branch`.
template <typename T>
__global__ __launch_bounds__(256) void pack_projections(Strided<const T> weight, Strided<const T> scale,
                                                        Strided<const T> shift, int64_t first_branch, int64_t branches,
                                                        int64_t inputs, int64_t outputs, int chunks, int steps,
                                                        int64_t items, uint2* packed) {
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (index >= items) return;
  int64_t rest = index;
  const int lane = int(rest % 32);
  rest /= 32;
  const int step = int(rest % steps);
  rest /= steps;
  const int tap = int(rest % kProjections);
  rest /= kProjections;
  const int64_t column = lane / 4, input = rest % chunks * kChunk + column;
  const int64_t output = (rest / chunks * steps + step) * 16 + lane % 4 * 2;
  uint32_t halves[2];
  for (int half = 0; half < 2; ++half) {
    float pair[2] = {0.0f, 0.0f};
    for (int e = 0; e < 2; ++e) {
      const int64_t o = output + 8 * half + e;
      if (o >= outputs) continue;
      if (tap == kShift) {
        if (shift.data != nullptr && column < branches) pair[e] = branch_value(shift, first_branch + column, o);
      } else if (input < inputs) {
        pair[e] = to_float(*weight.at(o, input, {tap / 9, tap / 3 % 3, tap % 3}));
        if (scale.data != nullptr) pair[e] *= branch_value(scale, first_branch, o);
      }
    }
    halves[half] = pack(pair[0], pair[1], T{});
  }
  packed[index] = {halves[0], halves[1]};
}

// G of this lane's points as operand a of the MMA steps: packed chunks of eight outputs from chunk `first` on, zero outside
// the target and beyond the last chunk.
template <int kSteps>
__device__ inline void load_grad(const Lattice& g, const Tile& tile, const unsigned char* grads, int chunks, int first,
                                 int z, int y0, int x, int channels, uint32_t (&grad)[kSteps][2][4]) {
  const int64_t target_points = packed_target_points(g);
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const bool valid = inside(target_position(g, tile, z, y0 + r, x), g.target);
    const int64_t point = (tile.n * chunks + first) * target_points + (valid ? packed_target(g, tile, z, y0 + r, x) : 0);
    const unsigned char* from = grads + point * kPointBytes + channels * 2;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i, from += target_points * kPointBytes)
      grad[i / 2][r / 2][2 * (i % 2) + r % 2] =
          valid && first + i < chunks ? *reinterpret_cast<const uint32_t*>(from) : 0u;
  }
}

// Rows of points times one packed projection: g_t of eight input channels, two of them this lane's.
template <typename T, int kSteps>
__device__ inline void project(const uint2* weight, const uint32_t (&grad)[kSteps][2][4], float (&projected)[2][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint2 b = weight[step * 32];
    mma<T>(projected[0], grad[step][0], b);
    mma<T>(projected[1], grad[step][1], b);
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
    const uint2* weight = args.weight + int64_t(pipeline.chunk()) * (kProjections * kSteps * 32) + lane;
    if (pipeline.chunk() % args.chunks == 0) {
      load_grad(g, pipeline.tile(), args.grads, args.output_chunks, output_block * (2 * kSteps), z, y0, x, channels, grad);
      float projected[2][4] = {};  // <shift_k, G>, of which a lane gets branches `channels` and the next
      project<T>(weight + kShift * (kSteps * 32), grad, projected);
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r)
#pragma unroll
        for (int k = 0; k < kLatticeBranches; ++k)
          if (channels == k / 2 * 2) sum[r][k] += projected[r / 2][r % 2 * 2 + k % 2];
    }
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
        float projected[2][4] = {};
        project<T>(weight + ((tz + 1) * kPlaneTaps + tap) * (kSteps * 32), grad, projected);
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
void launch_grad_attention(const Inputs& in, const TensorView& grad_output, const TensorView& grad_attention,
                           const Context& context) {
  const Problem& g = in.g;
  const bool scaled = in.scale.data != nullptr;
  const Plan plan = plan_all(in, Pass::kGradAttention);
  const int chunks = num_chunks(g.C), output_blocks = static_cast<int>(ceil_div(g.O, 16 * kSteps));
  const int64_t items = int64_t(output_blocks) * chunks * kProjections * kSteps * 32, tiles = num_tiles(plan.lattice);
  const unsigned char* points = pack_points(plan.lattice, in.input, g.C, kPointBytes, context);
  const unsigned char* grads = pack_points(packing_of_target(plan.lattice), grad_output, g.O, kPointBytes, context);
  for (int64_t k = 0; k < (scaled ? g.K : 1); ++k) {
    const Plan own = scaled ? plan_branch(in, Pass::kGradAttention, k) : plan;
    uint2* weight = static_cast<uint2*>(context.scratch(items * int64_t(sizeof(uint2))));
    launch("pack_projections", &pack_projections<T>, dim3(static_cast<unsigned int>(ceil_div(items, 256))), 256, 0,
           context.stream, Strided<const T>(in.weight), Strided<const T>(in.scale), Strided<const T>(in.shift), k,
           int64_t(own.lattice.K), g.C, g.O, chunks, kSteps, items, weight);
    TensorView target = grad_attention;
    target.data = static_cast<T*>(target.data) + k * target.c;
    const GradAttentionArguments<T> args{points,        weight, grads, chunks, output_blocks, num_chunks(g.O),
                                         Strided<T>(target)};
    const dim3 grid(static_cast<unsigned int>(own.blocks < tiles ? own.blocks : tiles));
    launch("fast_grad_attention", &fast_grad_attention_kernel<T, kSteps>, grid, own.threads, own.shared_bytes,
           context.stream, own.lattice, args);
  }
}

void fast_grad_attention(const Inputs& in, const TensorView& grad_output, const TensorView& grad_attention,
                         const Context& context) {
  for_16_bit(in.dtype, [&](auto element) {
    using T = decltype(element);
    if (in.g.O <= 32)
      launch_grad_attention<T, 2>(in, grad_output, grad_attention, context);
    else
      launch_grad_attention<T, 4>(in, grad_output, grad_attention, context);
  });
}

}  // namespace autofocus::cuda
