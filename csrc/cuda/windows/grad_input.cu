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

struct CopyBranches {
  static constexpr bool kReadsAhead = false;

  const unsigned char* points;
  int chunks;

  __device__ void write(const Lattice& lattice, const Planes& planes) const {
    Planes of_branch = planes;
    of_branch.chunk += planes.branch * chunks;
    CopyPoints{points, lattice.K * chunks}.write(lattice, of_branch);
  }
};

// A packed point times a number, each element rounded once.
template <typename T>
__device__ inline uint4 scaled_point(const uint4& point, T factor) {
  if constexpr (std::is_same_v<T, float>) {
    float values[kChunk<T>];
    unpack_point<T>(point, values);
    for (float& element : values) element *= factor;
    return packed_point<T>(values);
  } else {
    uint16_t bits;
    memcpy(&bits, &factor, sizeof(bits));
    const uint32_t pair = bits * 0x10001u;
    return {multiply(point.x, pair, T{}), multiply(point.y, pair, T{}), multiply(point.z, pair, T{}),
            multiply(point.w, pair, T{})};
  }
}

// Some points of G and their attention by one branch, on their way from global to shared memory.
template <typename T, int kCount>
struct GatedPoints {
  uint4 points[kCount];
  T gates[kCount];

  // The walk's next ones, which it goes past; zeros where it has none. Of point i of the source the attention is
  // gates[kLatticeBranches * i].
  __device__ void read(Points& walk, const uint4* from, const T* attention) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      points[i] = {0u, 0u, 0u, 0u};
      gates[i] = T{};
      if (walk.more() && walk.there()) {
        points[i] = from[walk.index()];
        gates[i] = attention[int64_t(walk.index()) * kLatticeBranches];
      }
      walk.advance();
    }
  }
  // To where `walk` began.
  __device__ void write(Points walk) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (walk.more())
        *reinterpret_cast<uint4*>(shared_memory() + walk.place() * kPointBytes) = scaled_point(points[i], gates[i]);
      walk.advance();
    }
  }
};

// Points of G times the attention of one branch, rounded once. A thread has up to kAtOnce loads under way.
template <typename T, int kAtOnce, int kAhead>
class WriteGated {
 public:
  static constexpr bool kReadsAhead = kAhead > 0;

  __device__ explicit WriteGated(const AdjointArguments<T>& args) : args_(args) {}

  __device__ void write(const Lattice& lattice, const Planes& planes) const {
    for (int pass = 0; pass < planes.cover.passes; ++pass) {
      Points walk(lattice, planes, pass);
      write_rest<kAtOnce>(walk, source(lattice, planes), gates(lattice, planes));
    }
  }
  // The first kAhead points of a thread are held in registers in between.
  __device__ void read(const Lattice& lattice, const Planes& planes) {
    Points walk(lattice, planes, 0);
    ahead_.read(walk, source(lattice, planes), gates(lattice, planes));
  }
  __device__ void write_read(const Lattice& lattice, const Planes& planes) const {
    for (int pass = 0; pass < planes.cover.passes; ++pass) {
      Points walk(lattice, planes, pass);
      if (pass == 0) {
        ahead_.write(walk);
        for (int i = 0; i < kAhead; ++i) walk.advance();
      }
      write_rest<2>(walk, source(lattice, planes), gates(lattice, planes));
    }
  }

 private:
  __device__ const uint4* source(const Lattice& lattice, const Planes& planes) const {
    const int64_t chunk = planes.tile.n * args_.chunks + planes.chunk;
    return held(reinterpret_cast<const uint4*>(args_.points) + chunk * lattice.packed_points);
  }
  __device__ const T* gates(const Lattice& lattice, const Planes& planes) const {
    const int64_t point = planes.tile.n * lattice.packed_points;
    return held(reinterpret_cast<const T*>(args_.gates) + point * kLatticeBranches + planes.branch);
  }

  // What is left of a walk, in groups no larger than needed: an instruction that is switched off takes its time too.
  template <int kCount>
  __device__ void write_rest(Points& walk, const uint4* from, const T* attention) const {
    if constexpr (kCount > 2) {
      while (walk.more(kCount / 2 + 1)) write_group<kCount>(walk, from, attention);
      write_rest<kCount / 2>(walk, from, attention);
    } else {
      while (walk.more()) write_group<kCount>(walk, from, attention);
    }
  }
  template <int kCount>
  __device__ void write_group(Points& walk, const uint4* from, const T* attention) const {
    const Points begin = walk;
    GatedPoints<T, kCount> group;
    group.read(walk, from, attention);
    group.write(begin);
  }

  const AdjointArguments<T>& args_;
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
      return WriteGated<T, kTiles <= 4 ? 8 : kTiles == 5 ? 4 : 2, kTiles <= 5 ? 3 : 0>(args);  // what leaves registers
    else
      return CopyBranches{args.points, args.chunks};
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
