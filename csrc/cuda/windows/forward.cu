// The forward of the fast tier in every mode, out = sum_k a_k (scale_k y_k + shift_k): an epilogue for branches.h that
// scales each term in registers and adds it to the output's sum. Also the launch that stores each branch by itself.
#include "branches.h"

namespace autofocus::cuda {

// The epilogue. A thread block has 8 kTiles output channels, by blockIdx.y, and its whole tile's sums in registers.
template <typename T, int kTiles>
class WeightedSum {
 public:
  static constexpr bool kInTurn = false;

  // Shared memory: the gates of the tile's points, branch scale, branch shift (more_bytes in plan.cu).
  __device__ WeightedSum(const Lattice& lattice, const BranchesArguments<T>& args, const Share& share)
      : lattice_(lattice), args_(args), share_(share) {
    copy_vectors<kTiles>(lattice, args.scale, output0(), args.outputs, scales());
    copy_vectors<kTiles>(lattice, args.shift, output0(), args.outputs, shifts());
  }

  __device__ void begin(const Tile& tile, int) {
    clear(sum_);
    for (int i = threadIdx.x; i < lattice_.tile_z * kTileY * kTileX; i += int(blockDim.x))
      reinterpret_cast<Gates<T>*>(gates())[i] =
          packed_attention<T>(lattice_, tile, args_.targets, {i / (kTileY * kTileX), i / kTileX % kTileY, i % kTileX});
  }
  __device__ void begin_shared() {}

  template <int kTogether>
  __device__ void take(int k, int m0, const float (&y)[kTogether][kTiles][4]) {
    if (args_.scale.data != nullptr)
      add<true>(k, m0, y);
    else
      add<false>(k, m0, y);
  }

  __device__ void end(const Tile& tile) {
    store_targets(lattice_, tile, args_.result, output0(), share_, sum_, [&](const Int3& point) {
      // Read once a tile, from global memory. The gates in shared memory would be valid here, too: the next tile's are
      // written only after the barrier in front of begin.
      Gates<T> packed{};
      if (args_.shift.data != nullptr) packed = packed_attention<T>(lattice_, tile, args_.targets, point);
      const float2 low = unpack(packed.pairs[0], T{}), high = unpack(packed.pairs[1], T{});
      return [=](int channel) {
        const float a[kLatticeBranches] = {low.x, low.y, high.x, high.y};
        float2 sum = {0.0f, 0.0f};
        if (args_.shift.data != nullptr)
#pragma unroll
          for (int k = 0; k < kLatticeBranches; ++k) {
            if (k >= lattice_.K) break;
            const float2 shift = *reinterpret_cast<const float2*>(shifts() + k * (8 * kTiles) + channel);
            sum.x += a[k] * shift.x;
            sum.y += a[k] * shift.y;
          }
        return sum;
      };
    });
  }

 private:
  template <bool kScaled, int kTogether>
  __device__ void add(int k, int m0, const float (&y)[kTogether][kTiles][4]) {
#pragma unroll
    for (int m = 0; m < kTogether; ++m) {
      float a[2];  // of this lane's two points of the plane
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const Int3 at = share_.point(2 * (m0 + m) + row);
        const int point = (at.z * kTileY + at.y) * kTileX + at.x;
        a[row] = to_float(reinterpret_cast<const T*>(gates())[point * kLatticeBranches + k]);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float2 scale = {1.0f, 1.0f};  // of this lane's two channels
        if (kScaled) scale = *reinterpret_cast<const float2*>(scales() + k * (8 * kTiles) + tile * 8 + share_.channels);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          float* sum = &sum_[m0 + m][tile][2 * row];
          const float* of_branch = &y[m][tile][2 * row];
          sum[0] = multiply_add(a[row], kScaled ? scale.x * of_branch[0] : of_branch[0], sum[0]);
          sum[1] = multiply_add(a[row], kScaled ? scale.y * of_branch[1] : of_branch[1], sum[1]);
        }
      }
    }
  }

  __device__ int64_t output0() const { return int64_t(blockIdx.y) * (8 * kTiles); }
  __device__ unsigned char* gates() const { return epilogue_memory<kTiles>(lattice_); }
  __device__ float* scales() const {
    return reinterpret_cast<float*>(gates() + lattice_.tile_z * (kTileY * kTileX) * kGateBytes<T>);
  }
  __device__ float* shifts() const { return scales() + kLatticeBranches * 8 * kTiles; }

  const Lattice& lattice_;
  const BranchesArguments<T>& args_;
  const Share& share_;
  float sum_[kGroupPlanes][kTiles][4];
};

namespace {

void launch_forward(const char* name, const Plan& plan, const Inputs& in, const Operands& operands,
                    const TensorView& output, bool adds, const Context& context) {
  for_matrix_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    const auto args = branches_arguments<T>(in, operands, operands.attention(), Target<T>(output, in.g.O, adds));
    for_tiles(plan.tiles, [&](auto tiles) {
      launch(name, &branches_kernel<T, tiles(), WeightedSum<T, tiles()>>, grid_of(plan, ceil_div(in.g.O, 8 * tiles())),
             plan.threads, plan.shared_bytes, context.stream, plan.lattice, args, planes_of(plan.lattice, args.source));
    });
  });
}

// Cuts the forward of a slice into parts, and for each packs its operands and calls run(plan of the part, operands,
// part).
template <typename Run>
void for_parts(const Inputs& in, const Context& context, const Run& run) {
  const Plan plan = plan_of(Pass::kForward, in);
  Operands operands(in, in.g);
  operands.want_input();
  operands.want_attention();
  operands.want_weight(plan.tiles);
  const Split split = split_of(in.g, {work_of(plan, ceil_div(in.g.O, 8 * plan.tiles))}, kForTime);
  void* memory = context.scratch(operands.bytes(split));
  for (int64_t i = 0; i < num_parts(split); ++i) {
    const Part part = part_of(in.g, split, i);
    operands.pack(part, memory, context);
    run(plan_of_part(plan, Pass::kForward, part), operands, part);
  }
}

}  // namespace

void fast_forward(const Inputs& in, const TensorView& output, const Context& context) {
  for (int64_t first = 0; first < in.g.K; first += kLatticeBranches) {
    const Inputs slice = slice_of(in, first);
    for_parts(slice, context, [&](const Plan& plan, const Operands& operands, const Part& part) {
      launch_forward("fast_forward", plan, slice, operands, samples_from(output, part, in.dtype), first > 0, context);
    });
  }
}

void fast_branches(const Inputs& in, const TensorView& branches, const Context& context) {
  for (int64_t first = 0; first < in.g.K; first += kLatticeBranches) {
    const Inputs slice = slice_of(in, first);
    for_parts(slice, context, [&](const Plan&, const Operands& operands, const Part& part) {
      for (int64_t k = 0; k < slice.g.K; ++k)
        launch_forward("fast_branch", plan_of_branch(Pass::kForward, slice, part, k), slice, operands,
                       samples_from(branch_view(branches, first + k, in.dtype), part, in.dtype), false, context);
    });
  }
}

}  // namespace autofocus::cuda
