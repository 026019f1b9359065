// Gradients of the weight and of the branch scale in the simple tier (docs/math.md, section 3).
//
// dW_t = sum_p G(p) u_t(p)^T, where u_t is the blend of the forward. With a branch scale, or a G for each branch, sums
// are kept apart by branch: M_kt = sum_p G(p) a_k(p) x(.)^T. Positions are split among blocks; weight_sum.h adds up
// their partial sums and makes the gradients.
#include "../elements.h"
#include "../weight_sum.h"

namespace autofocus::cuda {

constexpr int kTile = 32;                           // output channels, and input channels, of a block
constexpr int kPositions = 32;                      // positions staged at a time
constexpr int kWeightThreads = 256;                 // each sums 2 x 2 elements
constexpr int kRows = kWeightThreads / kPositions;  // channels that all threads stage at once

// Writes partial [splits, branches, O, C, T]. Grid (T * output tiles * input tiles, splits, branches), where branches
// is K, or 1 for the blend of all branches.
template <typename T>
__global__ __launch_bounds__(kWeightThreads) void simple_weight_partial(Problem g, Strided<const T> grad_output,
                                                                        Strided<const T> input,
                                                                        Strided<const T> attention,
                                                                        Accumulator<T>* partial) {
  using A = Accumulator<T>;
  A* grads = reinterpret_cast<A*>(shared_memory());  // [kPositions][kTile]
  A* blends = grads + kPositions * kTile;            // [kPositions][kTile]
  const int64_t taps = num_taps(g);
  const int64_t output_tiles = (g.O + kTile - 1) / kTile;
  const int64_t tap = blockIdx.x % taps;
  const int64_t o0 = blockIdx.x / taps % output_tiles * kTile, c0 = blockIdx.x / taps / output_tiles * kTile;
  const int64_t first_branch = gridDim.z == 1 ? 0 : blockIdx.z;
  const int64_t last_branch = gridDim.z == 1 ? g.K : first_branch + 1;
  const Index3 offset = tap_offset(g, tap);

  const int64_t voxels = volume(g.output), positions = g.N * voxels;
  const int64_t begin = positions * blockIdx.y / gridDim.y, end = positions * (blockIdx.y + 1) / gridDim.y;
  const int lane = threadIdx.x % kPositions, row = threadIdx.x / kPositions;
  const int o = threadIdx.x / (kTile / 2) * 2, c = threadIdx.x % (kTile / 2) * 2;
  A sum[2][2] = {};

  for (int64_t chunk = begin; chunk < end; chunk += kPositions) {
    __syncthreads();
    const int64_t index = chunk + lane;
    const bool active = index < end;
    const int64_t n = index / voxels;
    const Index3 p = unravel(index % voxels, g.output);
    A blended[kTile / kRows] = {};
    for (int64_t k = first_branch; active && k < last_branch; ++k) {
      const Index3 q = input_position(g, p, k, offset);
      if (!inside(q, g.input)) continue;
      const A a = to_accumulator(*attention.at(n, k, p));
#pragma unroll
      for (int i = 0; i < kTile / kRows; ++i) {
        const int64_t channel = c0 + row + i * kRows;
        if (channel < g.C) blended[i] += a * to_accumulator(*input.at(n, channel, q));
      }
    }
#pragma unroll
    for (int i = 0; i < kTile / kRows; ++i) {
      const int64_t channel = o0 + row + i * kRows;
      grads[lane * kTile + row + i * kRows] =
          active && channel < g.O ? to_accumulator(grad_output.at(n, channel, p)[first_branch * grad_output.k]) : A(0);
      blends[lane * kTile + row + i * kRows] = blended[i];
    }
    __syncthreads();
    A staged[2][2] = {};  // summed apart: a split may have 10^5 positions, too many to add one by one in float32
#pragma unroll 4
    for (int i = 0; i < kPositions; ++i)
      for (int a = 0; a < 2; ++a)
        for (int b = 0; b < 2; ++b) staged[a][b] += grads[i * kTile + o + a] * blends[i * kTile + c + b];
    for (int a = 0; a < 2; ++a)
      for (int b = 0; b < 2; ++b) sum[a][b] += staged[a][b];
  }

  A* block = partial + (int64_t(blockIdx.y) * gridDim.z + blockIdx.z) * g.O * g.C * taps;
  for (int a = 0; a < 2; ++a)
    for (int b = 0; b < 2; ++b)
      if (o0 + o + a < g.O && c0 + c + b < g.C) block[((o0 + o + a) * g.C + c0 + c + b) * taps + tap] = sum[a][b];
}

void simple_grad_weight(const Inputs& in, const TensorView& grad_output, const TensorView& grad_weight,
                        const TensorView& grad_scale, const Context& context) {
  const Problem& g = in.g;
  const int64_t taps = num_taps(g), elements = g.O * g.C * taps;
  const int64_t branches = in.scale.data == nullptr && grad_output.k == 0 ? 1 : g.K;
  const int64_t tiles = taps * ((g.O + kTile - 1) / kTile) * ((g.C + kTile - 1) / kTile);
  // Enough blocks to fill the device a few times over, but at least 1024 positions for each.
  const int64_t wanted = (8 * int64_t(device_limits().multiprocessors) + tiles * branches - 1) / (tiles * branches);
  const int64_t possible = (g.N * volume(g.output) + 1023) / 1024;
  const int splits = static_cast<int>(wanted < possible ? wanted : possible);
  void* partial = nullptr;
  for_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    using Read = Strided<const T>;
    partial = context.scratch(splits * branches * elements * int64_t(sizeof(A)));
    launch("simple_weight_partial", &simple_weight_partial<T>,
           dim3(static_cast<unsigned int>(tiles), splits, static_cast<unsigned int>(branches)), kWeightThreads,
           2 * kPositions * kTile * int(sizeof(A)), context.stream, g, Read(grad_output), Read(in.input),
           Read(in.attention), static_cast<A*>(partial));
  });
  sum_weight_partials(in, {partial, splits, branches, g.O, g.C}, grad_weight, grad_scale, false, context);
}

}  // namespace autofocus::cuda
