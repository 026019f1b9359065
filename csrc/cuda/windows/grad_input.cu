// Gradient of the input in the fast tier: the gather run backwards, with one sum for all branches (docs/math.md,
// section 3). The source of a branch is its packed a_k G, or its own gradient dy_k if the caller has it. A branch scale
// is multiplied into the packed weight, which then exists once for each branch.
//
// The turns of a tile are the chunks of output channels and, within a chunk, the branches.
#include "backward.h"
#include "tile.h"

namespace autofocus::cuda {

template <typename T>
struct AdjointArguments {
  Source source;                // Operands::grad_output of each branch
  const unsigned char* weight;  // Operands::adjoint_weight
  bool scaled;                  // there is a branch scale: each branch has a weight of its own
  Target<T> target;
};

// Grid (thread blocks, blocks of 8 kTiles input channels).
template <typename T, int kTiles>
__global__ __launch_bounds__(kMaxThreads, 1) void adjoint_kernel(Lattice lattice, AdjointArguments<T> args,
                                                                 const __grid_constant__ SourcePlanes planes) {
  const Share share;
  const int64_t target0 = int64_t(blockIdx.y) * (8 * kTiles);
  const int chunks = args.source.chunks, weights = args.scaled ? lattice.K : 1;  // weights of a chunk
  const unsigned char* weight = args.weight + int64_t(blockIdx.y) * chunks * weights * chunk_weight_bytes(kTiles);
  Pipeline<Readers::kOne> pipeline(lattice, args.source, planes, chunks);
  const auto slabs = [&](const Turn& turn, int first, int last) {
    // Without a scale all branches share a chunk's weight, which then stays for all its turns.
    if (args.scaled || turn.branch == 0)
      copy_slabs<kTiles>(lattice, pipeline, weight, turn.chunk * weights + (args.scaled ? turn.branch : 0), first,
                         last);
  };

  float sum[kGroupPlanes][kTiles][4];
  for (pipeline.start(slabs); pipeline.running(); pipeline.advance()) {
    if (pipeline.first_turn()) clear(sum);
    const int k = uniform(pipeline.turn().branch);
#pragma unroll 1
    for (int tz = -1; tz <= 1; ++tz) {
      pipeline.enter(tz, slabs);
      const Operand slab(shared_units(shared_memory() + pipeline.behind() + (tz + 1) * kSlabBytes<kTiles>), 8 * kTiles,
                         8);
      if (reads(lattice, tz)) {
        begin_products();
        uint32_t window[kGroupPlanes];
#pragma unroll
        for (int m = 0; m < kGroupPlanes; ++m) window[m] = first_window(lattice, pipeline, share.z0 + m, tz, k);
#pragma unroll kUnrolledProducts
        for (int pair = 0; pair < kTapPairs; ++pair) {
          Operand a[kGroupPlanes];
#pragma unroll
          for (int m = 0; m < kGroupPlanes; ++m) a[m] = two_taps(lattice, window[m], pair, k);
          window_product<T>(sum, a, slab.moved(pair * (16 * kTiles)), true);
        }
        commit_products();  // inside the `if`: after it, ptxas would add an empty product to close the group with
      }
      pipeline.ahead(tz);
      wait_for_products<0>(sum);
    }
    if (pipeline.last_turn())
      store_targets(lattice, pipeline.tile(), args.target, target0, share, sum,
                    [](const Int3&) { return [](int) { return float2{0.0f, 0.0f}; }; });
  }
}

void launch_grad_input(const Plan& plan, const Inputs& in, const Operands& operands, const TensorView& grad_input,
                       bool adds, const Context& context) {
  const Problem& g = in.g;
  const int chunks = num_chunks(g.O, in.dtype);
  for_matrix_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    const AdjointArguments<T> args{{operands.grad_output(), int(g.K) * chunks, 0, chunks},
                                   operands.adjoint_weight(),
                                   in.scale.data != nullptr,
                                   Target<T>(grad_input, g.C, adds)};
    for_tiles(plan.tiles, [&](auto tiles) {
      launch("fast_grad_input", &adjoint_kernel<T, tiles()>, grid_of(plan, ceil_div(g.C, 8 * tiles())), plan.threads,
             plan.shared_bytes, context.stream, plan.lattice, args, planes_of(plan.lattice, args.source));
    });
  });
}

}  // namespace autofocus::cuda
