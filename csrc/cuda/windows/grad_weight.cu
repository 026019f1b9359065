// Gradient of the weight in 16 bits, and the launches of both kernels (see grad_weight.h). The three taps of a row are
// the 24 columns of one operand b; operand a is formed once for the three rows of taps of a plane.
#include "grad_weight.h"

namespace autofocus::cuda {

namespace {

constexpr int kPlaneSteps = kTileY / 2;  // products of a plane and row of taps: k is two rows of eight points
constexpr int kBlockOutputs = 64;        // output channels of a thread block, 16 for each warp of a group
// The most tiles of a thread block. Tensor cores cut sums off instead of rounding them (docs/cuda.md), so n products in
// a row may lose n 2^-23 of a sum. 64 tiles with up to 64 products each lose half a thousandth at worst.
constexpr int64_t kTilesOfSum = 64;

// grad_output of one plane of a tile as fragments of operand a, one for each step: rows are this warp's 16 output
// channels, columns the 16 points of a step. In memory it is the other way round: eight packed points in x are an 8x8
// matrix whose columns are channels. load_grads loads it like that; turn transposes it when it is needed.
using PlaneGrads = uint32_t[kPlaneSteps][4];

__device__ inline void load_grads(const Lattice& lattice, const Tile& tile, const GradWeightArguments& args,
                                  int warp_chunk, int z, PlaneGrads& grads) {
  const int lane = threadIdx.x % 32;
  const GradColumn columns[2] = {{lattice, tile, args, warp_chunk, z, lane / 4},
                                 {lattice, tile, args, warp_chunk + 1, z, lane / 4}};
#pragma unroll
  for (int step = 0; step < kPlaneSteps; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) grads[step][i] = columns[i % 2].word(2 * step + i / 2, lane % 4);
}

__device__ inline void turn(const PlaneGrads& loaded, PlaneGrads& grads) {
#pragma unroll
  for (int step = 0; step < kPlaneSteps; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) grads[step][i] = transposed(loaded[step][i]);
}

// Stores the sums of the thread block. The second group hands its sums to the first through shared memory, where the
// points were (pipeline.finish has been called).
template <typename T>
__device__ inline void leave_sums(const GradWeightArguments& args, int output0, const float (&sum)[3][3][1][3][4]) {
  const int group = threadIdx.x / kGroupThreads, lane = threadIdx.x % 32;
  float* handed = reinterpret_cast<float*>(shared_memory());
  float* partial = args.partial + int64_t(blockIdx.x) * args.split_size;
#pragma unroll
  for (int tz = 0; tz < 3; ++tz)
#pragma unroll
    for (int ty = 0; ty < 3; ++ty) {
      const auto place = [&](int tx, int i) -> float& {
        return handed[(tx * 4 + i) * kGroupThreads + int(threadIdx.x) % kGroupThreads];
      };
      __syncthreads();
#pragma unroll
      for (int tx = 0; tx < 3; ++tx)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (group == 1) place(tx, i) = sum[tz][ty][0][tx][i];
      __syncthreads();
      if (group == 1 || output0 >= args.outputs) continue;
#pragma unroll
      for (int tx = 0; tx < 3; ++tx)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          store_partial(args, partial, output0 + lane / 4 + i / 2 * 8,
                        int64_t(blockIdx.y) * kChunk<T> + lane % 4 * 2 + i % 2, int64_t(args.source.held) * kChunk<T>,
                        {tz - 1, ty - 1, tx - 1}, sum[tz][ty][0][tx][i] + place(tx, i));
    }
}

// Grid (splits, chunks of input channels, blocks of kBlockOutputs output channels).
template <typename T>
__global__ void __launch_bounds__(kGradWeightThreads, 1)
    grad_weight_kernel(Lattice lattice, GradWeightArguments args, const __grid_constant__ SourcePlanes planes) {
  const int group = uniform(threadIdx.x / kGroupThreads), warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int output0 = int(blockIdx.z) * kBlockOutputs + 16 * warp;
  const int group_planes = lattice.tile_z / kGradWeightGroups;

  float sum[3][3][1][3][4];  // by tz and ty, then as window_product_over_points has d: tiles of columns are tx
  for (auto& plane : sum)
    for (auto& row : plane) clear(row);
  const Source source = chunk_of_block(args.source);
  Pipeline<Readers::kAtOnce> pipeline(lattice, source, planes, 1);
  unsigned char* gates = shared_memory() + pipeline.behind();
  const int tile_points = lattice.tile_z * kTileY * kTileX;

  const int first_z = group * group_planes;
  PlaneGrads loaded;
  for (pipeline.start(NoSlabs{}); pipeline.running(); pipeline.advance()) {
    load_grads(lattice, pipeline.tile(), args, output0 / kChunk<T>, first_z, loaded);
    __syncthreads();  // others may still read the gates of the tile before
    write_gates(lattice, pipeline.tile(), args, reinterpret_cast<T*>(gates));
#pragma unroll
    for (int tz = 0; tz < 3; ++tz) {
      pipeline.enter(tz - 1, NoSlabs{});
      if (group == 0) pipeline.ahead(tz - 1);  // while the other group multiplies
#pragma unroll 1
      for (int z = first_z; z < (reads(lattice, tz - 1) ? first_z + group_planes : 0); ++z) {
        PlaneGrads grads;
        turn(loaded, grads);
        // Load the next plane early, or the first one again for the next tz.
        const int next_z = z + 1 < first_z + group_planes ? z + 1 : first_z;
        load_grads(lattice, pipeline.tile(), args, output0 / kChunk<T>, next_z, loaded);
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
          const uint32_t plane = plane_of(lattice, pipeline, z, tz - 1, k), pitch = lattice.pitch[k];
          begin_products();
#pragma unroll
          for (int step = 0; step < kPlaneSteps; ++step)
#pragma unroll
            for (int ty = 0; ty < 3; ++ty)
              window_product_over_points<T>(
                  sum[tz][ty], a[step],
                  {plane + (2 * step + (ty - 1) * lattice.rate[k].y) * pitch - lattice.rate[k].x, pitch,
                   uint32_t(lattice.rate[k].x)});
          commit_products();
          wait_for_products<0>();
        }
      }
      for (auto& row : sum[tz]) wait_for_products<0>(row);
      if (group == 1) pipeline.ahead(tz - 1);  // copies by this group's threads too, if there is no copy engine
    }
  }
  pipeline.finish();
  leave_sums<T>(args, output0, sum);
}

GradWeightKernel kernel_of(DType dtype) {
  if (dtype == DType::kFloat32) return grad_weight_tf32_kernel_of();
  return {dtype == DType::kFloat16 ? &grad_weight_kernel<Half> : &grad_weight_kernel<BFloat16>, kBlockOutputs};
}

}  // namespace

Work grad_weight_work(const Plan& plan, const Problem& g, DType dtype) {
  return work_of(plan, num_chunks(g.C, dtype) * ceil_div(g.O, kernel_of(dtype).outputs));
}

WeightPartials weight_partials_of(const Work& work, const Problem& g, DType dtype, bool by_branch) {
  const int64_t splits = ceil_div(work.tiles, kTilesOfSum);
  return {nullptr, splits > work.at_once ? splits : work.at_once, by_branch ? g.K : 1, ceil_div(g.O, 16) * 16,
          num_chunks(g.C, dtype) * (kPointBytes / element_size(dtype))};
}

void launch_grad_weight(const Inputs& in, bool by_branch, const Part& part, const Operands& operands,
                        const WeightPartials& sums, bool adds, const Context& context) {
  const Problem& g = in.g;
  const GradWeightKernel kernel = kernel_of(in.dtype);
  const int chunks = num_chunks(g.C, in.dtype);
  const dim3 grid(static_cast<unsigned int>(sums.splits), static_cast<unsigned int>(chunks),
                  static_cast<unsigned int>(ceil_div(g.O, kernel.outputs)));
  const int64_t branch_size = sums.outputs * sums.inputs * num_taps(g);
  for (int k = 0; k < sums.branches; ++k) {
    const Plan plan = sums.branches == 1 ? plan_of_part(plan_of(Pass::kGradWeight, in), Pass::kGradWeight, part)
                                         : plan_of_branch(Pass::kGradWeight, in, part, k);
    const Source source{operands.input(), chunks, 0, 1};
    launch("fast_weight_partial", kernel.run, grid, plan.threads, plan.shared_bytes, context.stream, plan.lattice,
           GradWeightArguments{source, operands.attention(), operands.grad_output(), num_chunks(g.O, in.dtype), k,
                               by_branch ? int(g.K) : 1, static_cast<float*>(sums.data) + k * branch_size,
                               sums.branches * branch_size, adds, g.O, g.kernel},
           planes_of(plan.lattice, source));
  }
}

}  // namespace autofocus::cuda
