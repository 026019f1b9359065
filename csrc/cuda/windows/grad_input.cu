// Gradient of the input: the windows run backwards, one sum for all branches (docs/math.md, section 3). A branch's
// source is a_k G, formed while it is written to shared memory, so that G is in memory but once; a branch scale is in
// the weight, one for each branch. Where the caller has the gradient of every branch it is copied as it is.
//
// Chunks are those of the output channels, branch by branch within.
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

// The gradients of the branches [N, K, chunks, packed points].
struct CopyBranches : CopyPoints {
  int chunks;

  __device__ CopyBranches(const unsigned char* points, int branches, int chunks_)
      : CopyPoints(points, branches * chunks_), chunks(chunks_) {}

  __device__ void begin(const Lattice& lattice, const Planes& planes) {
    begin_chunk(lattice, planes.tile, planes.branch * chunks + planes.chunk);
  }
};

// A packed point times a number, each element rounded once.
template <typename T>
__device__ inline uint4 scaled_point(const uint4& point, T factor) {
  if constexpr (std::is_same_v<T, float>) {
    const auto scaled = [&](uint32_t word) { return tf32(float_of(word) * factor); };
    return {scaled(point.x), scaled(point.y), scaled(point.z), scaled(point.w)};
  } else {
    uint16_t bits;
    memcpy(&bits, &factor, sizeof(bits));
    const auto scaled = [&](uint32_t pair) { return multiply(pair, bits * 0x10001u, T{}); };
    return {scaled(point.x), scaled(point.y), scaled(point.z), scaled(point.w)};
  }
}

// Some points of G and their attention by one branch, on their way from global to shared memory.
template <typename T, int kMost>
struct GatedPoints {
  uint4 values[kMost];
  T gates[kMost];
  int count;
};

// Points of G times the attention of one branch, rounded once. A thread reads up to kAtOnce before it writes, and holds
// up to kAhead that it read ahead.
template <typename T, int kAtOnce, int kAhead>
class WriteGated {
 public:
  static constexpr bool kReadsAhead = true;

  __device__ explicit WriteGated(const AdjointArguments<T>& args) : args_(args) {}

  __device__ void begin(const Lattice& lattice, const Planes& planes) {
    const int64_t chunk = planes.tile.n * args_.chunks + planes.chunk;
    grad_output_ = reinterpret_cast<const uint4*>(args_.points) + chunk * lattice.packed_points;
    attention_ = reinterpret_cast<const T*>(args_.gates) + planes.tile.n * lattice.packed_points * kLatticeBranches +
                 planes.branch;
  }
  __device__ void write(const Lattice& lattice, const Planes& planes, Walk& walk) const {
    for (int left; (left = walk.left(planes)) > 0;) write_some<kAtOnce>(lattice, planes.cover, left, walk);
  }
  __device__ void read(const Lattice& lattice, const Planes& planes, const Walk& walk) {
    read_points(lattice, planes.cover, planes.cover.passes == 1 ? walk.left(planes) : 0, walk, ahead_);
  }
  __device__ void write_read(const Lattice& lattice, const Planes& planes, Walk& walk) const {
    write_points(planes.cover, walk, ahead_);
    write(lattice, planes, walk);
  }

 private:
  // At most kMost; not many more than there are, for an instruction that is switched off takes its time too.
  template <int kMost>
  __device__ void write_some(const Lattice& lattice, const Cover& cover, int left, Walk& walk) const {
    if constexpr (kMost > 2)
      if (left <= kMost * 5 / 8) return write_some<kMost / 2>(lattice, cover, left, walk);
    GatedPoints<T, kMost> points;
    read_points(lattice, cover, left, walk, points);
    write_points(cover, walk, points);
  }
  template <int kMost>
  __device__ void read_points(const Lattice& lattice, const Cover& cover, int left, Walk walk,
                              GatedPoints<T, kMost>& points) const {
    points.count = left < kMost ? left : kMost;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      points.values[i] = {0u, 0u, 0u, 0u};  // where the source has none
      points.gates[i] = T{};
      if (i < points.count && walk.there(lattice)) {
        points.values[i] = grad_output_[walk.index()];
        points.gates[i] = attention_[int64_t(walk.index()) * kLatticeBranches];
      }
      walk.advance(cover);
    }
  }
  template <int kMost>
  __device__ void write_points(const Cover& cover, Walk& walk, const GatedPoints<T, kMost>& points) const {
    Walk to = walk;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i < points.count)
        *reinterpret_cast<uint4*>(shared_memory() + to.place() * kPointBytes) =
            scaled_point(points.values[i], points.gates[i]);
      to.advance(cover);
    }
    walk.advance(cover, points.count);
  }

  const AdjointArguments<T>& args_;
  const uint4* grad_output_;
  const T* attention_;
  GatedPoints<T, kAhead> ahead_;
};

// Grid (blocks, blocks of 8 kTiles input channels).
template <typename T, int kTiles, bool kGated>
__global__ __launch_bounds__(kMaxThreads, 1) void adjoint_kernel(Lattice lattice, AdjointArguments<T> args) {
  const Share share;
  const int64_t target0 = int64_t(blockIdx.y) * (8 * kTiles);
  const int weights = args.scaled ? lattice.K : 1;  // of a chunk
  const unsigned char* weight = args.weight + int64_t(blockIdx.y) * args.chunks * weights * chunk_weight_bytes(kTiles);
  auto stage = [&] {
    if constexpr (kGated)
      return WriteGated<T, kTiles <= 5 ? 8 : 4, 3>(args);  // as many as there are registers for
    else
      return CopyBranches(args.points, lattice.K, args.chunks);
  }();
  Pipeline<Readers::kOne, std::decay_t<decltype(stage)>> pipeline(lattice, args.chunks, stage);
  const int slabs = pipeline.behind();

  float sum[kGroupPlanes][kTiles][4];
  for (pipeline.start([&] { copy_slabs<kTiles>(slabs, weight, 0, 0, 3); }); pipeline.running(); pipeline.advance()) {
    if (pipeline.first_turn()) clear(sum);
    const int k = uniform(pipeline.turn().branch);
    const Turn next = pipeline.next_turn();
#pragma unroll 1
    for (int tz = -1; tz <= 1; ++tz) {
      pipeline.enter(tz);
      const Operand slab(shared_units(shared_memory() + slabs + (tz + 1) * kSlabBytes<kTiles>), 8 * kTiles, 8);
      if (reads(lattice, tz)) {
        begin_products();
        uint32_t window[kGroupPlanes];
#pragma unroll
        for (int m = 0; m < kGroupPlanes; ++m) window[m] = first_window(lattice, share.z0 + m, tz, k);
#pragma unroll kUnrolledProducts
        for (int pair = 0; pair < kTapPairs; ++pair) {
          Operand a[kGroupPlanes];
#pragma unroll
          for (int m = 0; m < kGroupPlanes; ++m) a[m] = two_taps(lattice, window[m], pair, k);
          window_product<T>(sum, a, slab.moved(pair * (16 * kTiles)), true);
        }
      }
      commit_products();
      pipeline.ahead(tz);  // behind the products: it takes a processor's time where points are not just copied
      wait_for_products<0>(sum);
      pipeline.leave(tz, [&] {
        // Another chunk of channels has another weight; without a scale all branches of one share it.
        if (args.scaled || next.branch == 0)
          copy_slabs<kTiles>(slabs, weight, next.chunk * weights + (args.scaled ? next.branch : 0), tz < 0 ? 0 : 1,
                             tz < 0 ? 1 : 3);
      });
    }
    if (pipeline.last_turn())
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
