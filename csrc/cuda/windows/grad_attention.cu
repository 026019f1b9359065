// Gradient of the attention in the fast tier, da_k = sum_o G_o (scale_k y_k + shift_k) (docs/math.md, section 3): an
// epilogue for branches.h, which computes the branches again. Each term is multiplied by G while it is in registers.
#include "backward.h"
#include "branches.h"

namespace autofocus::cuda {

// The epilogue. A thread block goes through all blocks of output channels of a tile. For each of its four points a lane
// sums over its own channels; at the end of the tile the four lanes that share a point add up their sums.
template <typename T, int kTiles>
class DotWithGrad {
 public:
  static constexpr bool kInTurn = true;

  // Shared memory: branch scale and shift of the current block of output channels.
  __device__ DotWithGrad(const Lattice& lattice, const BranchesArguments<T>& args, const Share& share)
      : lattice_(lattice), args_(args), share_(share) {}

  __device__ void begin(const Tile& tile, int turn) {
    if (turn == 0)
      for (auto& planes : total_)
        for (auto& plane : planes)
          for (float& total : plane) total = 0.0f;
    const int64_t output0 = int64_t(turn) * (8 * kTiles);
    copy_vectors<kTiles>(lattice_, args_.scale, output0, args_.outputs, scales());
    copy_vectors<kTiles>(lattice_, args_.shift, output0, args_.outputs, shifts());
    constexpr int kTileChunks = 8 / kChunk<T>;
    const int chunks = int(ceil_div(args_.outputs, kChunk<T>)),
              first = turn * (kTiles * kTileChunks) + share_.channels / kChunk<T>;
    const int64_t points = lattice_.packed_targets;
#pragma unroll
    for (int r = 0; r < kPointsPerLane; ++r) {
      const Int3 at = share_.point(r);
      const bool there = has_target(tile, at.z, at.y, at.x);
      const int64_t point =
          (tile.n * chunks + first) * points + (there ? packed_target(lattice_, tile, at.z, at.y, at.x) : 0);
      const unsigned char* from = args_.targets + point * kPointBytes + share_.channels % kChunk<T> * int(sizeof(T));
#pragma unroll
      for (int i = 0; i < kTiles; ++i, from += kTileChunks * points * kPointBytes)
        grad_[r / 2][i][r % 2] =
            held(there && first + i * kTileChunks < chunks ? *reinterpret_cast<const Pair<T>*>(from) : Pair<T>{});
    }
  }

  // Adds <shift_k, G>, once for each block of output channels.
  __device__ void begin_shared() {
    if (args_.shift.data == nullptr) return;
#pragma unroll 1
    for (int k = 0; k < lattice_.K; ++k) add<kGroupPlanes, true>(k, 0, shifts(), [](int, int, int) { return 1.0f; });
  }

  template <int kTogether>
  __device__ void take(int k, int m0, const float (&y)[kTogether][kTiles][4]) {
    const auto value = [&](int m, int tile, int i) { return y[m][tile][i]; };
    if (args_.scale.data != nullptr)
      add<kTogether, true>(k, m0, scales(), value);
    else
      add<kTogether, false>(k, m0, nullptr, value);
  }

  __device__ void end(const Tile& tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < kPointsPerLane; ++r) {
      const Int3 at = share_.point(r);
      const Index3 p = target_position(lattice_, tile, at.z, at.y, at.x);
      const bool stores = lane % 4 == r && has_target(tile, at.z, at.y, at.x);
#pragma unroll
      for (int k = 0; k < kLatticeBranches; ++k) {
        float total = total_[k][r / 2][r % 2];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        if (stores && k < lattice_.K) store(args_.result.values.at(tile.n, k, p), total);
      }
    }
  }

 private:
  // Two values of G: as floats where there are registers for them, else packed.
  static constexpr bool kHoldsFloats = kTiles <= 4;
  using Held = std::conditional_t<kHoldsFloats, float2, Pair<T>>;
  __device__ static Held held(Pair<T> pair) {
    if constexpr (kHoldsFloats)
      return unpack(pair, T{});
    else
      return pair;
  }
  __device__ static float2 unheld(Held held) {
    if constexpr (kHoldsFloats)
      return held;
    else
      return unpack(held, T{});
  }

  __device__ float* scales() const { return reinterpret_cast<float*>(epilogue_memory<kTiles>(lattice_)); }
  __device__ float* shifts() const { return scales() + kLatticeBranches * 8 * kTiles; }

  // Adds sum_o G_o factors_k[o] value(m, tile, i) to total_[k], at the points of planes m0 .. m0 + kTogether - 1.
  template <int kTogether, bool kFactors, typename Value>
  __device__ void add(int k, int m0, const float* factors, const Value& value) {
#pragma unroll
    for (int m = 0; m < kTogether; ++m) {
      float dot[2] = {};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float2 factor = {1.0f, 1.0f};  // of this lane's two channels
        if (kFactors)
          factor = *reinterpret_cast<const float2*>(factors + k * (8 * kTiles) + tile * 8 + share_.channels);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const float2 grad = unheld(grad_[m0 + m][tile][row]);
          const float first = value(m, tile, 2 * row), second = value(m, tile, 2 * row + 1);
          dot[row] = multiply_add(grad.x, kFactors ? factor.x * first : first, dot[row]);
          dot[row] = multiply_add(grad.y, kFactors ? factor.y * second : second, dot[row]);
        }
      }
#pragma unroll
      for (int branch = 0; branch < kLatticeBranches; ++branch)
        if (branch == k) {  // not total_[k]: an array that is indexed at run time lies in local memory
          total_[branch][m0 + m][0] += dot[0];
          total_[branch][m0 + m][1] += dot[1];
        }
    }
  }

  const Lattice& lattice_;
  const BranchesArguments<T>& args_;
  const Share& share_;
  Held grad_[kGroupPlanes][kTiles][2];              // G by plane and row, two channels of each eight
  float total_[kLatticeBranches][kGroupPlanes][2];  // by plane and row
};

void launch_grad_attention(const Plan& plan, const Inputs& in, const Operands& operands,
                           const TensorView& grad_attention, const Context& context) {
  for_matrix_dtype(in.dtype, [&](auto element) {
    using T = decltype(element);
    const auto args =
        branches_arguments<T>(in, operands, operands.grad_output(), Target<T>(grad_attention, in.g.K, false));
    for_tiles(plan.tiles, [&](auto tiles) {
      // Wider ones would spill with floats; plan.cu chooses none.
      if constexpr (!std::is_same_v<T, float> || tiles() <= kNarrowTiles)
        launch("fast_grad_attention", &branches_kernel<T, tiles(), DotWithGrad<T, tiles()>>, grid_of(plan, 1),
               plan.threads, plan.shared_bytes, context.stream, plan.lattice, args,
               planes_of(plan.lattice, args.source));
    });
  });
}

}  // namespace autofocus::cuda
