// Batch-normalised branches: the passes over branches that are in memory already (docs/branch_norm.md, sections 2 and
// 3): statistics, combination, and the gradients of both. Calls of either tier use them.
//
// All kernels are bound by memory; a thread has a position and a few channels of it. For the statistics, the mean of a
// branch is first estimated from a sample, and moments are taken about this estimate, the pivot. So a variance is never
// a difference of large sums.
#include "simple/simple.h"

namespace autofocus::cuda {

constexpr int kNormChannels = 8;             // channels of a thread: enough loads under way, few enough registers
constexpr int kNormBlocks = 4;               // the fewest blocks on a multiprocessor, for __launch_bounds__
constexpr int64_t kSamples = 1024;           // positions (about) that the first estimate of a mean is made of
constexpr int64_t kBlockPositions = 131072;  // the most of a block, so that a thread sums at most 1024 in float32

// What branch_totals makes of the two sums of a branch and channel: those of w and of w (y - pivot).
enum class Totals { kEstimate, kMoments, kGradients };

// Writes partial [splits, K, O, 2], the sums of w and of w (y - pivot) over `count` positions, `spacing` apart. w is
// a_k G, or y - pivot if grad_output is null. A null pivot is zero. Grid (splits, blocks of kNormChannels, K).
template <typename T>
__global__ __launch_bounds__(kSimpleThreads, kNormBlocks) void branch_sums(Problem g, Strided<const T> branches,
                                                                           Strided<const T> attention,
                                                                           Strided<const T> grad_output,
                                                                           const Accumulator<T>* pivot, int64_t count,
                                                                           int64_t spacing, Accumulator<T>* partial) {
  using A = Accumulator<T>;
  A* sums = reinterpret_cast<A*>(shared_memory());  // [2 kNormChannels][kSimpleThreads]
  const int64_t k = blockIdx.z, o0 = int64_t(blockIdx.y) * kNormChannels, voxels = volume(g.output);
  A centre[kNormChannels], of_w[kNormChannels] = {}, of_product[kNormChannels] = {};
#pragma unroll
  for (int j = 0; j < kNormChannels; ++j) centre[j] = pivot != nullptr && o0 + j < g.O ? pivot[k * g.O + o0 + j] : A(0);

  const int64_t begin = count * blockIdx.x / gridDim.x, end = count * (blockIdx.x + 1) / gridDim.x;
  for (int64_t i = begin + threadIdx.x; i < end; i += kSimpleThreads) {
    const int64_t index = i * spacing, n = index / voxels;
    const Index3 p = unravel(index % voxels, g.output);
    const T* y = branches.at(n, o0, p) + k * branches.k;
    const bool gated = grad_output.data != nullptr;
    const A a = gated ? to_accumulator(*attention.at(n, k, p)) : A(0);
    const T* grad = gated ? grad_output.at(n, o0, p) : nullptr;
#pragma unroll
    for (int j = 0; j < kNormChannels; ++j) {
      if (o0 + j >= g.O) continue;
      const A distance = to_accumulator(y[j * branches.c]) - centre[j];
      const A w = gated ? a * to_accumulator(grad[j * grad_output.c]) : distance;
      of_w[j] += w;
      of_product[j] += w * distance;
    }
  }

#pragma unroll
  for (int j = 0; j < kNormChannels; ++j) {
    sums[2 * j * kSimpleThreads + threadIdx.x] = of_w[j];
    sums[(2 * j + 1) * kSimpleThreads + threadIdx.x] = of_product[j];
  }
  sum_rows<kSimpleThreads>(sums, 2 * kNormChannels);
  const int row = threadIdx.x;
  if (row < 2 * kNormChannels && o0 + row / 2 < g.O)
    partial[((int64_t(blockIdx.x) * g.K + k) * g.O + o0) * 2 + row] = sums[row * kSimpleThreads];
}

// Adds up the splits, in double. Grid (O, K), a block for each branch and channel.
// kEstimate: `first` becomes the mean of the sample, `second` is not written. kMoments: `first` is the pivot and
// becomes the mean, `second` becomes the biased variance. kGradients: they become the two sums.
template <typename A>
__global__ __launch_bounds__(kSimpleThreads) void branch_totals(int64_t splits, const A* partial, int64_t count,
                                                                Totals totals, A* first, A* second) {
  double* sums = reinterpret_cast<double*>(shared_memory());  // [2][kSimpleThreads]
  const int64_t o = blockIdx.x, k = blockIdx.y, O = gridDim.x, K = gridDim.y;
  double of_w = 0, of_product = 0;
  for (int64_t split = threadIdx.x; split < splits; split += kSimpleThreads) {
    const A* at = partial + ((split * K + k) * O + o) * 2;
    of_w += at[0];
    of_product += at[1];
  }
  sums[threadIdx.x] = of_w;
  sums[kSimpleThreads + threadIdx.x] = of_product;
  sum_rows<kSimpleThreads>(sums, 2);
  if (threadIdx.x != 0) return;
  A& to_first = first[k * O + o];
  A& to_second = second[k * O + o];
  of_w = sums[0];
  of_product = sums[kSimpleThreads];
  if (totals == Totals::kGradients) {
    to_first = A(of_w);
    to_second = A(of_product);
    return;
  }
  const double offset = of_w / double(count);
  if (totals == Totals::kEstimate) {
    to_first = A(offset);
  } else {
    to_first = A(double(to_first) + offset);
    to_second = A(of_product / double(count) - offset * offset);
  }
}

// Runs both kernels, over `count` positions `spacing` apart.
template <typename T>
void sum_branches(const BranchTensors& in, const void* pivot, int64_t count, int64_t spacing, Totals totals,
                  void* first, void* second, const Context& context) {
  using A = Accumulator<T>;
  using Read = Strided<const T>;
  const Problem& g = in.g;
  const int64_t tiles = (g.O + kNormChannels - 1) / kNormChannels;
  // Enough blocks to fill the device a few times over, with at least 1024 and at most kBlockPositions positions each.
  const int64_t wanted = (8 * int64_t(device_limits().multiprocessors) + tiles * g.K - 1) / (tiles * g.K);
  const int64_t possible = (count + 1023) / 1024, needed = (count + kBlockPositions - 1) / kBlockPositions;
  const int64_t filling = wanted < possible ? wanted : possible;
  const int64_t splits = filling > needed ? filling : needed;
  A* partial = static_cast<A*>(context.scratch(splits * g.K * g.O * 2 * int64_t(sizeof(A))));
  launch("branch_sums", &branch_sums<T>,
         dim3(static_cast<unsigned int>(splits), static_cast<unsigned int>(tiles), static_cast<unsigned int>(g.K)),
         kSimpleThreads, 2 * kNormChannels * kSimpleThreads * int(sizeof(A)), context.stream, g, Read(in.branches),
         Read(in.attention), Read(in.grad_output), static_cast<const A*>(pivot), count, spacing, partial);
  launch("branch_totals", &branch_totals<A>, dim3(static_cast<unsigned int>(g.O), static_cast<unsigned int>(g.K)),
         kSimpleThreads, 2 * kSimpleThreads * int(sizeof(double)), context.stream, splits,
         static_cast<const A*>(partial), count, totals, static_cast<A*>(first), static_cast<A*>(second));
}

void branch_moments(const BranchTensors& in, void* mean, void* var, const Context& context) {
  const int64_t positions = in.g.N * volume(in.g.output);
  // Odd: sizes are often powers of two, and a spacing like that would keep to the columns at one side.
  const int64_t spacing = positions / kSamples | 1;
  const int64_t samples = (positions + spacing - 1) / spacing;
  for_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    sum_branches<T>(in, nullptr, samples, spacing, Totals::kEstimate, mean, var, context);
    sum_branches<T>(in, mean, positions, 1, Totals::kMoments, mean, var, context);
  });
}

// output = sum_k a_k (scale_k y_k + shift_k). Grid (position blocks, blocks of kNormChannels).
template <typename T>
__global__ __launch_bounds__(kSimpleThreads, kNormBlocks) void branch_combination(Problem g, Strided<const T> branches,
                                                                                  Strided<const T> attention,
                                                                                  const Accumulator<T>* scale,
                                                                                  const Accumulator<T>* shift,
                                                                                  Strided<T> output) {
  using A = Accumulator<T>;
  const Position position = thread_position(g.N, g.output);
  if (!position.active) return;
  const int64_t o0 = int64_t(blockIdx.y) * kNormChannels;
  A sum[kNormChannels] = {};
  for (int64_t k = 0; k < g.K; ++k) {
    const A a = to_accumulator(*attention.at(position.n, k, position.p));
    const T* y = branches.at(position.n, o0, position.p) + k * branches.k;
#pragma unroll
    for (int j = 0; j < kNormChannels; ++j)
      if (o0 + j < g.O)
        sum[j] += a * (scale[k * g.O + o0 + j] * to_accumulator(y[j * branches.c]) + shift[k * g.O + o0 + j]);
  }
#pragma unroll
  for (int j = 0; j < kNormChannels; ++j)
    if (o0 + j < g.O) store(output.at(position.n, o0 + j, position.p), sum[j]);
}

void branch_combine(const BranchTensors& in, const void* scale, const void* shift, const TensorView& output,
                    const Context& context) {
  const Problem& g = in.g;
  const dim3 grid(position_blocks(g.N, g.output), static_cast<unsigned int>((g.O + kNormChannels - 1) / kNormChannels));
  for_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    using Vector = const Accumulator<T>*;
    launch("branch_combination", &branch_combination<T>, grid, kSimpleThreads, 0, context.stream, g,
           Strided<const T>(in.branches), Strided<const T>(in.attention), static_cast<Vector>(scale),
           static_cast<Vector>(shift), Strided<T>(output));
  });
}

// da_k = sum_o G (scale_k y_k + shift_k). Grid (position blocks, K).
template <typename T>
__global__ __launch_bounds__(kSimpleThreads, kNormBlocks) void branch_grad_attention(
    Problem g, Strided<const T> grad_output, Strided<const T> branches, const Accumulator<T>* scale,
    const Accumulator<T>* shift, Strided<T> grad_attention) {
  using A = Accumulator<T>;
  const Position position = thread_position(g.N, g.output);
  if (!position.active) return;
  const int64_t k = blockIdx.y;
  const T* grad = grad_output.at(position.n, 0, position.p);
  const T* y = branches.at(position.n, 0, position.p) + k * branches.k;
  A sum = A(0);
#pragma unroll 4
  for (int64_t o = 0; o < g.O; ++o)
    sum += to_accumulator(grad[o * grad_output.c]) *
           (scale[k * g.O + o] * to_accumulator(y[o * branches.c]) + shift[k * g.O + o]);
  store(grad_attention.at(position.n, k, position.p), sum);
}

void branch_reduce(const BranchTensors& in, const void* mean, const void* scale, const void* shift,
                   const TensorView& grad_attention, void* grad_scale, void* grad_shift, const Context& context) {
  const Problem& g = in.g;
  for_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    using Vector = const Accumulator<T>*;
    sum_branches<T>(in, mean, g.N * volume(g.output), 1, Totals::kGradients, grad_shift, grad_scale, context);
    if (grad_attention.data != nullptr)
      launch("branch_grad_attention", &branch_grad_attention<T>,
             dim3(position_blocks(g.N, g.output), static_cast<unsigned int>(g.K)), kSimpleThreads, 0, context.stream, g,
             Strided<const T>(in.grad_output), Strided<const T>(in.branches), static_cast<Vector>(scale),
             static_cast<Vector>(shift), Strided<T>(grad_attention));
  });
}

// dy_k = a_coef_k a_k G + b_coef_k y_k + c_coef_k. Grid (position blocks, blocks of kNormChannels). grad_branches may
// be the memory of the branches: a thread reads all elements of y_k that it overwrites first.
template <typename T>
__global__ __launch_bounds__(kSimpleThreads,
                             kNormBlocks) void branch_gradient(Problem g, Strided<const T> grad_output,
                                                               Strided<const T> branches, Strided<const T> attention,
                                                               const Accumulator<T>* a_coef,
                                                               const Accumulator<T>* b_coef,
                                                               const Accumulator<T>* c_coef, Strided<T> grad_branches) {
  using A = Accumulator<T>;
  const Position position = thread_position(g.N, g.output);
  if (!position.active) return;
  const int64_t o0 = int64_t(blockIdx.y) * kNormChannels;
  A grad[kNormChannels];
#pragma unroll
  for (int j = 0; j < kNormChannels; ++j)
    grad[j] = o0 + j < g.O ? to_accumulator(*grad_output.at(position.n, o0 + j, position.p)) : A(0);
  for (int64_t k = 0; k < g.K; ++k) {
    const A a = to_accumulator(*attention.at(position.n, k, position.p));
    const T* y = branches.at(position.n, o0, position.p) + k * branches.k;
    T* to = grad_branches.at(position.n, o0, position.p) + k * grad_branches.k;
    A dy[kNormChannels];
#pragma unroll
    for (int j = 0; j < kNormChannels; ++j)
      if (o0 + j < g.O)
        dy[j] = a_coef[k * g.O + o0 + j] * (a * grad[j]) +
                b_coef[k * g.O + o0 + j] * to_accumulator(y[j * branches.c]) + c_coef[k * g.O + o0 + j];
#pragma unroll
    for (int j = 0; j < kNormChannels; ++j)
      if (o0 + j < g.O) store(to + j * grad_branches.c, dy[j]);
  }
}

void branch_gradients(const BranchTensors& in, const void* a_coef, const void* b_coef, const void* c_coef,
                      const TensorView& grad_branches, const Context& context) {
  const Problem& g = in.g;
  const dim3 grid(position_blocks(g.N, g.output), static_cast<unsigned int>((g.O + kNormChannels - 1) / kNormChannels));
  for_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    using Vector = const Accumulator<T>*;
    launch("branch_gradient", &branch_gradient<T>, grid, kSimpleThreads, 0, context.stream, g,
           Strided<const T>(in.grad_output), Strided<const T>(in.branches), Strided<const T>(in.attention),
           static_cast<Vector>(a_coef), static_cast<Vector>(b_coef), static_cast<Vector>(c_coef),
           Strided<T>(grad_branches));
  });
}

}  // namespace autofocus::cuda
