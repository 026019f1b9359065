// The fast tier's common parts: packed operands, the launch plan, and the pipeline that keeps a tile in shared memory.
//
// A block goes through tiles (lattice.h) and, within a tile, through chunks of eight source channels. A point of a chunk is
// eight 16-bit channels, 16 bytes, copied asynchronously. docs/cuda.md draws the stages.
#pragma once

#include "elements.h"
#include "lattice.h"

namespace autofocus::cuda {

constexpr int kChunk = 8;         // source channels of a packed point
constexpr int kPointBytes = 16;   // kChunk elements of 16 bits
constexpr int kGateBytes = 8;     // the attention of a point: kLatticeBranches elements of 16 bits
constexpr int kPlanePairs = 5;    // MMA steps of one tz: nine taps, two a step, one empty place
constexpr int kRowsPerWarp = 4;   // a warp's target points: four rows of eight, neighbours in y
constexpr int kMaxThreads = 512;  // a thread for each target point of a tile, except:
// The gradient of the weight gives a warp one ty and a quarter of the tile's planes.
constexpr int kWeightSplits = 4;
constexpr int kWeightThreads = 3 * kWeightSplits * 32;

// Lattices, block and shared memory of a pass. `gates`: the attention of every source point is staged too.
struct Plan {
  Lattice lattice;
  int threads;
  int shared_bytes;
  int blocks;  // that run at once on the device
};

// Null, or why the pass cannot run on the current device; then `plan` is not set.
const char* make_plan(const Problem& g, DType dtype, Pass pass, Plan& plan);
// The plan of a pass that fast_refusal lets pass: for all branches at once, or for branch k alone. The latter has the same
// classes and tiles, so operands packed for one plan serve the other.
Plan plan_all(const Inputs& in, Pass pass);
Plan plan_branch(const Inputs& in, Pass pass, int64_t k);

// Chunks of channels, and what packing them takes.
inline int num_chunks(int64_t channels) { return static_cast<int>((channels + kChunk - 1) / kChunk); }

// source [N, channels, *] -> [N, chunks, points of all classes] of `bytes`, zeros beyond the source and the last
// channel. With a source for each of the lattice's K branches: [N, K, chunks, points].
const unsigned char* pack_points(const Lattice& g, const TensorView& source, int64_t channels, int bytes,
                                 const Context& context);
// The weight as MMA operand b of the blend kernels: [target blocks, chunks, tz, pair, target_tiles, lane].
const uint2* pack_blend_weight(const Inputs& in, bool adjoint, int target_tiles, const Context& context);

// Grid (blocks, blocks of `block_targets` target channels) that fills the device once, no block without a tile.
inline dim3 target_grid(const Plan& plan, int64_t targets, int block_targets) {
  const int64_t target_blocks = ceil_div(targets, block_targets), tiles = num_tiles(plan.lattice);
  const int64_t wanted = ceil_div(plan.blocks, target_blocks);
  return dim3(static_cast<unsigned int>(wanted < tiles ? wanted : tiles), static_cast<unsigned int>(target_blocks));
}

// ------------------------------------------------------------------ device side

template <typename V>
__device__ inline V load_shared(const unsigned char* from) {
  return *reinterpret_cast<const V*>(from);
}

// function(k) for each of K branches, without a jump between them when K is the usual 4: loads of one branch then need not
// wait for the sums of another.
template <typename Function>
__device__ inline void for_branches(int K, Function&& function) {
  if (K == kLatticeBranches) {
#pragma unroll
    for (int k = 0; k < kLatticeBranches; ++k) function(k);
  } else {
#pragma unroll
    for (int k = 0; k < kLatticeBranches - 1; ++k)
      if (k < K) function(k);
  }
}

// Copies planes [first, last) of a tile's block of points to their slots, kBytes a point. A thread keeps to one place of
// the plane, so that it counts from plane to plane and divides nothing.
template <int kBytes>
__device__ inline void stage_planes(const Lattice& g, const Tile& tile, const unsigned char* packed,
                                    unsigned char* shared, int first, int last, bool in_ring) {
  const Tile block = tile;  // out of shared memory, which the copies are known to write
  const int64_t plane_bytes = int64_t(g.points.y) * g.points.x * kBytes;
  for (int place = threadIdx.x; place < plane_size(g); place += int(blockDim.x)) {
    const int row = place / kPitch, column = place % kPitch;
    if (column >= columns(g)) continue;
    const bool in_plane = has_place(g, block, row, column);
    const unsigned char* from = packed + packed_index(g, block, first, row, column) * kBytes;
#pragma unroll 1
    for (int plane = first; plane < last; ++plane, from += plane_bytes) {
      const bool valid = in_plane && has_plane(g, block, plane);
      const int held = in_ring ? slot(g, plane) : plane;
      copy_async<kBytes>(shared + (held * plane_size(g) + place) * kBytes, valid ? from : packed, valid);
    }
  }
}

// What a block works through, and the copies that run ahead of it.
//
// A chunk has three phases, tz = -1, 0, +1, and its planes three parts: [0, reach) is read by tz = -1 only,
// [tile_z + reach, planes) by tz = +1 only. With a slot for every plane, the next chunk's first part is copied during
// tz = 0 and +1, and its last part during its own tz = -1; only the middle part is waited for. With a smaller ring the last
// part takes the slots of the first, and is copied during tz = 0.
//
// Every thread of the block calls every method, in the order start, {enter, leave} x 3, advance.
template <bool kGates>
class Pipeline {
 public:
  // `points` [N, chunks_held, packed points]; this block reads `chunks` of them from `first_chunk` on, beginning again
  // after the last one held, for each of the tiles number block, block + blocks, ...
  __device__ Pipeline(const Lattice& g, const unsigned char* points, int chunks_held, int first_chunk, int chunks,
                      const unsigned char* gates, int64_t block, int64_t blocks)
      : g_(g), points_(points), gates_(gates), chunks_held_(chunks_held), first_chunk_(first_chunk), chunks_(chunks),
        blocks_(blocks), tiles_(num_tiles(g)), tile_(block), chunk_(0), parity_(0) {
    shared_points_ = shared_memory();
    shared_gates_ = shared_points_ + int64_t(g.ring) * plane_size(g) * kPointBytes;
    shared_tiles_ = reinterpret_cast<Tile*>(shared_gates_ + (kGates ? int64_t(planes(g)) * plane_size(g) * kGateBytes : 0));
  }

  __device__ bool running() const { return tile_ < tiles_; }
  __device__ int chunk() const { return chunk_; }
  __device__ bool last_chunk() const { return chunk_ + 1 == chunks_; }
  __device__ const Tile& tile() const { return shared_tiles_[parity_]; }
  __device__ int64_t tile_number() const { return tile_; }
  __device__ const unsigned char* points() const { return shared_points_; }
  __device__ const unsigned char* gates() const { return shared_gates_; }
  // Shared memory behind the pipeline's own.
  __device__ unsigned char* behind() const { return reinterpret_cast<unsigned char*>(shared_tiles_ + 2); }

  __device__ void start() {
    if (threadIdx.x == 0 && running()) shared_tiles_[0] = tile_at(g_, tile_);
    __syncthreads();
    if (recycles() || !running()) return;
    copy(0, false, 0, first_part(), false);
    copy_async_commit();
    copy(0, false, first_part(), last_part(), true);
    copy_async_commit();
    copy(0, false, last_part(), planes(g_), false);
    copy_async_commit();
  }

  __device__ void enter(int tz) {
    if (tz == 0) return;
    if (recycles()) {
      if (tz < 0) {
        copy(chunk_, false, 0, last_part(), chunk_ == 0);
        copy_async_commit();
      }
      copy_async_wait<0>();
    } else {
      copy_async_wait<1>();
    }
    __syncthreads();
    // Decoding a tile number takes a dozen divisions: one thread does it, once a tile, when all are done with the last.
    if (tz < 0 && chunk_ == 0 && threadIdx.x == 0 && tile_ + blocks_ < tiles_)
      shared_tiles_[1 - parity_] = tile_at(g_, tile_ + blocks_);
  }

  __device__ void leave(int tz) {
    if (tz == 0) return;
    __syncthreads();
    const int next = last_chunk() ? 0 : chunk_ + 1;
    if (tz < 0) {
      if (recycles())
        copy(chunk_, false, last_part(), planes(g_), false);
      else
        copy(next, last_chunk(), 0, first_part(), false);
      copy_async_commit();
    } else if (!recycles()) {
      copy(next, last_chunk(), first_part(), last_part(), next == 0);
      copy_async_commit();
      copy(next, last_chunk(), last_part(), planes(g_), false);
      copy_async_commit();
    }
  }

  __device__ void advance() {
    if (!last_chunk()) {
      ++chunk_;
      return;
    }
    chunk_ = 0;
    tile_ += blocks_;
    parity_ = 1 - parity_;
  }

 private:
  __device__ bool recycles() const { return g_.ring < planes(g_); }
  __device__ int first_part() const { return g_.reach.z; }
  __device__ int last_part() const { return g_.tile_z + g_.reach.z; }

  // Planes [first, last) of chunk `chunk` of this tile or the next one, and the attention of all planes with it if asked.
  __device__ void copy(int chunk, bool next_tile, int first, int last, bool with_gates) {
    if (next_tile && tile_ + blocks_ >= tiles_) return;
    const Tile& tile = shared_tiles_[next_tile ? 1 - parity_ : parity_];
    const int64_t block = tile.n * chunks_held_ + (first_chunk_ + chunk) % chunks_held_;
    stage_planes<kPointBytes>(g_, tile, points_ + block * packed_points(g_) * kPointBytes, shared_points_, first, last,
                              true);
    if (kGates && with_gates)
      stage_planes<kGateBytes>(g_, tile, gates_ + tile.n * packed_points(g_) * kGateBytes, shared_gates_, 0, planes(g_),
                               false);
  }

  const Lattice& g_;
  const unsigned char* points_;
  const unsigned char* gates_;
  int chunks_held_, first_chunk_, chunks_;
  int64_t blocks_, tiles_, tile_;
  int chunk_, parity_;
  unsigned char* shared_points_;
  unsigned char* shared_gates_;
  Tile* shared_tiles_;
};

// The packed attention of target point (z, y, x) of a tile, one 16-bit element a branch; zeros outside the target.
__device__ inline uint2 packed_attention(const Lattice& g, const Tile& tile, const unsigned char* gates, int z, int y,
                                         int x) {
  if (!inside(target_position(g, tile, z, y, x), g.target)) return {0u, 0u};
  const int64_t point = tile.n * packed_target_points(g) + packed_target(g, tile, z, y, x);
  return *reinterpret_cast<const uint2*>(gates + point * kGateBytes);
}

// Attention of this lane's four target points (rows y0 .. y0 + 3 at column x).
template <typename T>
__device__ inline void load_attention(const Lattice& g, const Tile& tile, const unsigned char* gates, int z, int y0, int x,
                                      float (&a)[kRowsPerWarp][kLatticeBranches]) {
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const uint2 packed = packed_attention(g, tile, gates, z, y0 + r, x);
    const float2 low = unpack(packed.x, T{}), high = unpack(packed.y, T{});
    a[r][0] = low.x;
    a[r][1] = low.y;
    a[r][2] = high.x;
    a[r][3] = high.y;
  }
}

// The attention of every target point of the tile, in shared memory. Call it between Pipeline::leave(+1) of one tile and
// enter(-1) of the next, whose barriers order it, and read it between enter(-1) and leave(+1).
__device__ inline void share_attention(const Lattice& g, const Tile& tile, const unsigned char* gates,
                                       unsigned char* shared) {
  for (int i = threadIdx.x; i < g.tile_z * kTileY * kTileX; i += int(blockDim.x))
    *reinterpret_cast<uint2*>(shared + i * kGateBytes) =
        packed_attention(g, tile, gates, i / (kTileY * kTileX), i / kTileX % kTileY, i % kTileX);
}

// Stores the sums of this lane's four target points, with sum_k a_k shift_k added if kShifted. Tiles of eight channels from
// `target0`, of which the lane holds two.
template <bool kShifted, typename T, int kTargetTiles>
__device__ inline void store_targets(const Lattice& g, const Tile& tile, const Strided<T>& target, int64_t targets,
                                     int64_t target0, int z, int y0, int x, int channels,
                                     const float (&sum)[2][kTargetTiles][4], const Strided<const T>& shift,
                                     const float (&a)[kRowsPerWarp][kLatticeBranches]) {
  T* row[kRowsPerWarp];  // channel target0 of each point; null outside the target
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const Index3 p = target_position(g, tile, z, y0 + r, x);
    row[r] = inside(p, g.target) ? target.at(tile.n, target0, p) : nullptr;
  }
#pragma unroll
  for (int i = 0; i < kTargetTiles; ++i)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int channel = i * 8 + channels + e;
      if (target0 + channel >= targets) continue;
      float h[kLatticeBranches] = {};
      if (kShifted && shift.data != nullptr)
#pragma unroll
        for (int k = 0; k < kLatticeBranches; ++k)
          if (k < g.K) h[k] = branch_value(shift, k, target0 + channel);
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) {
        float value = sum[r / 2][i][r % 2 * 2 + e];
        if (kShifted)
#pragma unroll
          for (int k = 0; k < kLatticeBranches; ++k) value += a[r][k] * h[k];
        if (row[r] != nullptr) store(row[r] + channel * target.c, value);
      }
    }
}

}  // namespace autofocus::cuda
