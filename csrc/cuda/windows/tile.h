// A tile as the kernels of the windows see it: a lane's share of it, its windows, and what lies under its points
// elsewhere.
#pragma once

#include "plan.h"
#include "product.h"

namespace autofocus::cuda {

// What a lane has of d: the points (z, y, x) of its tile, and the first of its two channels in each tile of eight.
struct Share {
  int z0, y0, x, channels;

  __device__ Share() {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    z0 = uniform(int(threadIdx.x) / kGroupThreads) * kGroupPlanes;
    y0 = 2 * warp;
    x = lane / 4;
    channels = lane % 4 * 2;
  }
  // Element d[r / 2][tile][2 (r % 2)] and the next.
  __device__ Int3 point(int r) const { return {z0 + r / 2, y0 + r % 2, x}; }
};

// Where the points of plane z of a tile lie through tap (tz, 0, 0) of branch k, in points of 16 bytes.
template <typename Pipeline>
__device__ inline uint32_t plane_place(const Lattice& lattice, const Pipeline& pipeline, int z, int tz, int k) {
  return pipeline.slot(tap_plane(lattice, z, tz, k)) * lattice.plane_points + lattice.centre[k];
}
// The same as operands count.
template <typename Pipeline>
__device__ inline uint32_t plane_of(const Lattice& lattice, const Pipeline& pipeline, int z, int tz, int k) {
  return shared_units(shared_memory()) + plane_place(lattice, pipeline, z, tz, k);
}

// Where the window of tap 0 of a plane begins.
template <typename Pipeline>
__device__ inline uint32_t first_window(const Lattice& lattice, const Pipeline& pipeline, int z, int tz, int k) {
  return plane_of(lattice, pipeline, z, tz, k) + lattice.tap_points[0][k];
}
// Two taps of a chunk of channels as operand a. The last tap has no second one: the same points again, with weights of
// zero.
__device__ inline Operand two_taps(const Lattice& lattice, uint32_t first_window, int pair, int k) {
  return {first_window + lattice.tap_pairs[pair][k], uint32_t(lattice.pitch[k])};
}

// Copies slabs [first, last) of the weight of a chunk, of a kernel with one tap in z only that of tz = 0.
template <int kTiles, typename Pipeline>
__device__ inline void copy_slabs(const Lattice& lattice, Pipeline& pipeline, const unsigned char* weight, int chunk,
                                  int first, int last) {
  if (!reads(lattice, -1)) {
    if (first > 1) return;
    first = 1;
  }
  const int at = first * kSlabBytes<kTiles>;
  pipeline.copy(pipeline.behind() + at, weight + int64_t(chunk) * chunk_weight_bytes(kTiles) + at,
                (last - first) * kSlabBytes<kTiles>);
}

// The packed attention of target point p = (z, y, x) of a tile; zeros outside the target.
template <typename T>
__device__ inline Gates<T> packed_attention(const Lattice& lattice, const Tile& tile, const unsigned char* gates,
                                            const Int3& p) {
  if (!has_target(tile, p.z, p.y, p.x)) return {};
  const int64_t point = tile.n * lattice.packed_targets + packed_target(lattice, tile, p.z, p.y, p.x);
  return reinterpret_cast<const Gates<T>*>(gates)[point];
}

// A target of sums: [N, channels, *S].
template <typename T>
struct Target {
  Strided<T> values;
  int64_t channels;
  bool pairs;  // two channels from an even one on are a pair in memory
  bool adds;   // to what is there, or replaces it

  Target(const TensorView& tensor, int64_t channels_, bool adds_)
      : values(tensor),
        channels(channels_),
        pairs(alignment_of(tensor, int(sizeof(T))) >= 2 * int(sizeof(T))),
        adds(adds_) {}
};

// Stores this lane's sums of target channels from `target0` on. added(p) gives, for the point p of the tile, a function
// (channel of the block) of what is added to the first of two channels and to the second.
template <typename T, int kTiles, typename Added>
__device__ inline void store_targets(const Lattice& lattice, const Tile& tile, const Target<T>& target, int64_t target0,
                                     const Share& share, const float (&sum)[kGroupPlanes][kTiles][4],
                                     const Added& added) {
  const int left = target.channels - target0 < 8 * kTiles ? int(target.channels - target0) : 8 * kTiles;
  const auto put = [&](T* to, float value) { store(to, target.adds ? to_float(*to) + value : value); };
  const auto put_pair = [&](Pair<T>* to, float first, float second) {
    if (target.adds) {
      const float2 old = unpack(*to, T{});
      first += old.x;
      second += old.y;
    }
    *to = pack_pair({first, second}, T{});
  };
#pragma unroll
  for (int r = 0; r < kPointsPerLane; ++r) {
    const Int3 point = share.point(r);
    if (!has_target(tile, point.z, point.y, point.x)) continue;
    T* to =
        target.values.at(tile.n, target0 + share.channels, target_position(lattice, tile, point.z, point.y, point.x));
    const auto add = added(point);
#pragma unroll
    for (int i = 0; i < kTiles; ++i, to += 8 * target.values.c) {
      const int channel = i * 8 + share.channels;
      const float2 more = add(channel);
      const float first = sum[r / 2][i][r % 2 * 2] + more.x, second = sum[r / 2][i][r % 2 * 2 + 1] + more.y;
      if (target.pairs && channel + 1 < left) {
        put_pair(reinterpret_cast<Pair<T>*>(to), first, second);
      } else {
        if (channel < left) put(to, first);
        if (channel + 1 < left) put(to + target.values.c, second);
      }
    }
  }
}

}  // namespace autofocus::cuda
