// What the kernels of the fast tier do with a tile: a lane's share of its sums, the windows of its taps as operands,
// the weight's way to shared memory, the attention of its points, and storing its results.
#pragma once

#include "plan.h"
#include "product.h"

namespace autofocus::cuda {

// A lane's share of the sums d of its warpgroup's two planes: four points, and two neighbouring channels in every
// eight.
struct Share {
  int z0, y0, x;  // the first of the points
  int channels;   // the first channel, modulo 8

  __device__ Share() {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    z0 = uniform(int(threadIdx.x) / kGroupThreads) * kGroupPlanes;
    y0 = 2 * warp;
    x = lane / 4;
    channels = lane % 4 * 2;
  }
  // The point of d[r / 2][tile][2 (r % 2)] and of the element behind it, for r in 0 .. 3.
  __device__ Int3 point(int r) const { return {z0 + r / 2, y0 + r % 2, x}; }
};

// Where in shared memory the first point of plane z of a tile lies through tap (tz, 0, 0) of branch k, in points.
template <typename Pipeline>
__device__ inline uint32_t plane_place(const Lattice& lattice, const Pipeline& pipeline, int z, int tz, int k) {
  return pipeline.slot(tap_plane(lattice, z, tz, k)) * lattice.plane_points + lattice.centre[k];
}
// The same as an address in units of 16 bytes, as operands have it.
template <typename Pipeline>
__device__ inline uint32_t plane_of(const Lattice& lattice, const Pipeline& pipeline, int z, int tz, int k) {
  return shared_units(shared_memory()) + plane_place(lattice, pipeline, z, tz, k);
}

// Where the window of tap 0 (ty = tx = -1) of a plane begins, in units of 16 bytes.
template <typename Pipeline>
__device__ inline uint32_t first_window(const Lattice& lattice, const Pipeline& pipeline, int z, int tz, int k) {
  return plane_of(lattice, pipeline, z, tz, k) + lattice.tap_points[0][k];
}
// A pair of taps as operand a: rows are the 64 points of a plane, k the channels of a chunk, once for each tap. The
// ninth tap is paired with itself; the second time its weights are zero.
__device__ inline Operand two_taps(const Lattice& lattice, uint32_t first_window, int pair, int k) {
  return {first_window + lattice.tap_pairs[pair][k], uint32_t(lattice.pitch[k])};
}

// Copies slabs [first, last) of a chunk's weight, 0 .. 2 for tz = -1 .. 1, to their places behind the pipeline. A
// kernel with one tap in z reads only slab 1.
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

// Where sums are stored: a tensor [N, channels, *S] and how to write it.
template <typename T>
struct Target {
  Strided<T> values;
  int64_t channels;
  bool pairs;  // an even channel and the next can be stored at once
  bool adds;   // adds to what is there instead of overwriting it

  Target(const TensorView& tensor, int64_t channels_, bool adds_)
      : values(tensor),
        channels(channels_),
        pairs(alignment_of(tensor, int(sizeof(T))) >= 2 * int(sizeof(T))),
        adds(adds_) {}
};

// Stores this lane's sums for the 8 kTiles target channels from `target0` on; points and channels outside the target
// are skipped. added(p) is called once for each point p of the tile. It returns a function of a channel, counted from
// target0, that gives what to add to this channel and to the next.
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
