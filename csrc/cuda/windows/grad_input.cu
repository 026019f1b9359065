// Gradient of the input: the windows run backwards, one sum for all branches (docs/math.md, section 3). A branch's
// source is a_k G, formed while it is written to shared memory, so that G is in memory but once; a branch scale is in
// the weight, one for each branch. Where the caller has the gradient of every branch it is copied as it is.
//
// Chunks are those of the output channels, branch by branch within: chunk c is that of branch c % K.
#include "backward.h"
#include "tile.h"

namespace autofocus::cuda {

template <typename T>
struct AdjointArguments {
  const unsigned char* points;  // Operands::grad_output, of each branch unless gated
  const unsigned char* gates;   // Operands::attention
  const unsigned char* weight;  // Operands::adjoint_weight
  int chunks;
  bool scaled;  // a weight for each branch
  int64_t targets;
  Strided<T> target;
  bool adds;  // to the target, or replaces it
};

struct CopyBranches {
  const unsigned char* points;
  int chunks;

  __device__ void operator()(const Lattice& lattice, const Tile& tile, const Cover& cover, int chunk, int first,
                             int last) const {
    const CopyPoints copy{points, lattice.K * chunks};
    copy(lattice, tile, cover, chunk % lattice.K * chunks + chunk / lattice.K, first, last);
  }
};

// Points of G times the attention of one branch, rounded once.
template <typename T, int kAtOnce>  // kAtOnce: loads under way
struct WriteGated {
  const AdjointArguments<T>& args;

  __device__ void operator()(const Lattice& lattice, const Tile& tile, const Cover& cover, int chunk, int first,
                             int last) const {
    const int k = chunk % lattice.K, source_chunk = chunk / lattice.K;
    const int64_t points = packed_points(lattice);
    const unsigned char* from = args.points + (tile.n * args.chunks + source_chunk) * points * kPointBytes;
    const T* gates = reinterpret_cast<const T*>(args.gates) + tile.n * points * kLatticeBranches + k;
    for (int pass = 0; pass < cover.passes; ++pass) {
      Points walk(lattice, tile, cover, pass, first, last);
      while (walk.more()) {
        uint4 value[kAtOnce];
        T gate[kAtOnce];
        int place[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          place[i] = walk.more() ? walk.place() : -1;
          value[i] = {0u, 0u, 0u, 0u};
          gate[i] = T{};
          if (walk.more() && walk.there()) {
            value[i] = *reinterpret_cast<const uint4*>(from + int64_t(walk.index()) * kPointBytes);
            gate[i] = gates[int64_t(walk.index()) * kLatticeBranches];
          }
          walk.advance();
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (place[i] < 0) continue;
          float values[kChunk<T>];
          unpack_point<T>(value[i], values);
#pragma unroll
          for (float& element : values) element *= to_float(gate[i]);
          *reinterpret_cast<uint4*>(shared_memory() + place[i] * kPointBytes) = packed_point<T>(values);
        }
      }
    }
  }
};

// Grid (blocks, blocks of 8 kTiles input channels).
template <typename T, int kTiles, bool kGated>
__global__ __launch_bounds__(kMaxThreads, 1) void adjoint_kernel(Lattice lattice, AdjointArguments<T> args) {
  const Share share;
  const int64_t target0 = int64_t(blockIdx.y) * (8 * kTiles);
  const int weights = args.scaled ? lattice.K : 1;  // of a chunk
  const unsigned char* weight = args.weight + int64_t(blockIdx.y) * args.chunks * weights * chunk_weight_bytes(kTiles);
  const auto stage = [&] {
    if constexpr (kGated)
      return WriteGated<T, kTiles <= 5 ? 4 : 2>{args};  // as many as leave registers
    else
      return CopyBranches{args.points, args.chunks};
  }();
  Pipeline<Readers::kOne, std::decay_t<decltype(stage)>> pipeline(lattice, args.chunks * lattice.K, stage);
  const int slabs = pipeline.behind();

  float sum[kGroupPlanes][kTiles][4];
  for (pipeline.start([&] { copy_slabs<kTiles>(slabs, weight, 0, 0, 3); }); pipeline.running(); pipeline.advance()) {
    if (pipeline.chunk() == 0) clear(sum);
    const int k = pipeline.chunk() % lattice.K, next = pipeline.next_chunk();
#pragma unroll 1
    for (int tz = -1; tz <= 1; ++tz) {
      pipeline.enter(tz);
      const uint32_t slab = shared_units(shared_memory() + slabs + (tz + 1) * kSlabBytes<kTiles>);
      if (reads(lattice, tz)) {
        begin_products();
        uint32_t plane[kGroupPlanes];
#pragma unroll
        for (int m = 0; m < kGroupPlanes; ++m) plane[m] = plane_of(lattice, share.z0 + m, tz, k);
#pragma unroll kUnrolledProducts
        for (int tap = 0; tap < kPlaneTaps; tap += 2) {
          Operand a[kGroupPlanes];
#pragma unroll
          for (int m = 0; m < kGroupPlanes; ++m) a[m] = two_taps(lattice, plane[m], tap, k);
          window_product<T>(sum, a, {slab + tap * (8 * kTiles), 8 * kTiles, 8}, true);
        }
      }
      commit_products();
      pipeline.ahead(tz);  // behind the products: it takes a processor's time where points are not just copied
      wait_for_products<0>(sum);
      pipeline.leave(tz, [&] {
        // Another chunk of channels has another weight; without a scale all branches of one share it.
        if (args.scaled || next % lattice.K == 0)
          copy_slabs<kTiles>(slabs, weight, next * weights / lattice.K, tz < 0 ? 0 : 1, tz < 0 ? 1 : 3);
      });
    }
    if (pipeline.last_chunk())
      store_targets(lattice, pipeline.tile(), args.target, args.targets, target0, args.adds, share, sum,
                    [](const Int3&) { return [](int) { return float2{0.0f, 0.0f}; }; });
  }
}

void launch_grad_input(const Plan& plan, const Inputs& in, bool by_branch, const Operands& operands,
                       const TensorView& grad_input, bool adds, const Context& context) {
  const Problem& g = in.g;
  for_matrix_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    const AdjointArguments<T> args{operands.grad_output(),    operands.attention(),
                                   operands.adjoint_weight(), num_chunks(g.O, in.dtype),
                                   in.scale.data != nullptr,  g.C,
                                   Strided<T>(grad_input),    adds};
    for_tiles(plan.tiles, [&](auto tiles) {
      launch(by_branch ? "fast_branch_grad_input" : "fast_grad_input",
             by_branch ? &adjoint_kernel<T, tiles(), false> : &adjoint_kernel<T, tiles(), true>,
             grid_of(plan, ceil_div(g.C, 8 * tiles())), plan.threads, plan.shared_bytes, context.stream, plan.lattice,
             args);
    });
  });
}

}  // namespace autofocus::cuda
