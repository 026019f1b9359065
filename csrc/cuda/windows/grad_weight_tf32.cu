// Gradient of the weight in TF32 (see grad_weight.h). Neither warpgroup MMA nor ldmatrix transposes 32-bit elements, so
// every GPU loads the windows as fragments of mma.sync by plain loads. A product (m16n8k8) is 16 output channels by two
// taps of the chunk's four input channels, summed over the eight points of a row. A warp has two rows of every plane of
// its group.
#include "grad_weight.h"

namespace autofocus::cuda {

namespace {

constexpr int kOutputBlocks = 2;  // 16 output channels each; a fragment of operand b is loaded once for both
constexpr int kWarpRows = 2;      // rows of a plane
constexpr int kWarps = kGradWeightThreads / 32;
static_assert(kWarps == kOutputBlocks * 4, "a warp adds up one register of a product's sums");
static_assert(kTileX == 8 && kWarpRows * kGroupThreads / 32 == kTileY, "a product's k, and every row has a warp");

// Loads kWarpRows rows of plane z of grad_output, from row y on, as fragments of operand a: rows are 16 output
// channels, columns the eight points of a row.
__device__ inline void load_grads(const Lattice& lattice, const Tile& tile, const GradWeightArguments& args,
                                  int first_chunk, int z, int y, float (&grads)[kWarpRows][kOutputBlocks][4]) {
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < kOutputBlocks; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int chunk = first_chunk + (16 * m + 8 * (i % 2) + row) / kChunk<float>;
      const GradColumn points(lattice, tile, args, chunk, z, column + i / 2 * 4);
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) grads[r][m][i] = float_of(points.word(y + r, row % kChunk<float>));
    }
}

// Stores the sums of the thread block. Its warps have summed over different points, so their sums are added up, through
// shared memory where the points were (pipeline.finish has been called). A product leaves kWarps registers of sums in a
// lane; warp i adds up register i of all warps.
__device__ inline void leave_sums(const GradWeightArguments& args, int output0,
                                  const float (&sum)[3][kTapPairs][kOutputBlocks][4]) {
  float* handed = reinterpret_cast<float*>(shared_memory());
  float* partial = args.partial + int64_t(blockIdx.x) * args.split_size;
  const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
  const int any_warp = int(threadIdx.x) / 32, m = any_warp / 4, i = any_warp % 4;
  const int64_t o = output0 + 16 * m + row + i / 2 * 8;
  const int b_column = column * 2 + i % 2;
#pragma unroll
  for (int tz = 0; tz < 3; ++tz)
#pragma unroll
    for (int pair = 0; pair < kTapPairs; ++pair) {
      __syncthreads();
#pragma unroll
      for (int r = 0; r < kWarps; ++r) handed[(any_warp * kWarps + r) * 32 + lane] = sum[tz][pair][r / 4][r % 4];
      __syncthreads();
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += handed[(w * kWarps + any_warp) * 32 + lane];
      const int tap = 2 * pair + b_column / kChunk<float>;
      if (tap < kPlaneTaps && output0 + 16 * m < args.outputs)
        store_partial(args, partial, o, int64_t(blockIdx.y) * kChunk<float> + b_column % kChunk<float>,
                      int64_t(args.source.held) * kChunk<float>, {tz - 1, tap / 3 - 1, tap % 3 - 1}, total);
    }
}

__global__ void __launch_bounds__(kGradWeightThreads, 1)
    grad_weight_tf32_kernel(Lattice lattice, GradWeightArguments args, const __grid_constant__ SourcePlanes planes) {
  const int group = uniform(threadIdx.x / kGroupThreads), warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int row = lane / 4, column = lane % 4;
  const int output0 = int(blockIdx.z) * (16 * kOutputBlocks);
  const int group_planes = lattice.tile_z / kGradWeightGroups;

  float sum[3][kTapPairs][kOutputBlocks][4];  // by tz and pair of taps
  for (auto& plane : sum) clear(plane);
  const Source source = chunk_of_block(args.source);
  Pipeline<Readers::kAtOnce, Reads::kPlain> pipeline(lattice, source, planes, 1);
  float* gates = reinterpret_cast<float*>(shared_memory() + pipeline.behind());
  const int tile_points = lattice.tile_z * kTileY * kTileX;

  for (pipeline.start(NoSlabs{}); pipeline.running(); pipeline.advance()) {
    __syncthreads();  // others may still read the gates of the tile before
    write_gates(lattice, pipeline.tile(), args, gates);
#pragma unroll
    for (int tz = 0; tz < 3; ++tz) {
      pipeline.enter(tz - 1, NoSlabs{});
      if (group == 0) pipeline.ahead(tz - 1);  // while the other group multiplies
#pragma unroll 1
      for (int z = group * group_planes; z < (reads(lattice, tz - 1) ? (group + 1) * group_planes : 0); ++z) {
        float grads[kWarpRows][kOutputBlocks][4];
        load_grads(lattice, pipeline.tile(), args, output0 / kChunk<float>, z, kWarpRows * warp, grads);
#pragma unroll 1
        for (int k = 0; k < lattice.K; ++k) {
          // Of operand b this lane has input channel row % 4 of points `column` and column + 4, through the first tap
          // of a pair if row < 4, else through the second. This is its word for the middle tap and row 0 of the plane.
          const unsigned char* words = shared_memory() +
                                       (plane_place(lattice, pipeline, z, tz - 1, k) + column) * kPointBytes +
                                       row % kChunk<float> * int(sizeof(float));
          const float* gate = gates + (args.branch + k) * tile_points + z * (kTileY * kTileX) + column;
#pragma unroll
          for (int r = 0; r < kWarpRows; ++r) {
            const int y = kWarpRows * warp + r;
            uint32_t a[kOutputBlocks][4];
#pragma unroll
            for (int m = 0; m < kOutputBlocks; ++m)
#pragma unroll
              for (int i = 0; i < 4; ++i) a[m][i] = tf32(gate[y * kTileX + i / 2 * 4] * grads[r][m][i]);
#pragma unroll
            for (int pair = 0; pair < kTapPairs; ++pair) {
              // The ninth tap is paired with itself; nobody reads these sums.
              const int second = 2 * pair + 1 < kPlaneTaps ? 2 * pair + 1 : 2 * pair;
              const int tap = row < kChunk<float> ? lattice.tap_points[2 * pair][k] : lattice.tap_points[second][k];
              const unsigned char* at = words + (y * lattice.pitch[k] + tap) * kPointBytes;
              const uint2 b = {*reinterpret_cast<const uint32_t*>(at),
                               *reinterpret_cast<const uint32_t*>(at + 4 * kPointBytes)};
#pragma unroll
              for (int m = 0; m < kOutputBlocks; ++m) mma<float>(sum[tz][pair][m], a[m], b);
            }
          }
        }
      }
      if (group == 1) pipeline.ahead(tz - 1);
    }
  }
  pipeline.finish();
  leave_sums(args, output0, sum);
}

}  // namespace

GradWeightKernel grad_weight_tf32_kernel_of() { return {&grad_weight_tf32_kernel, 16 * kOutputBlocks}; }

}  // namespace autofocus::cuda
