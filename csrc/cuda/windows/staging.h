// The block of points under a tile, kept in shared memory while it is multiplied: which part is written when.
//
// A chunk has three phases, tz = -1, 0, +1, and its planes three parts. The first part is read by tz = -1 only, the
// last by tz = +1 only; the middle lies under the tile. With a slot for every plane the last part is written during the
// chunk's own tz = -1, the next chunk's first part during tz = 0 and what tz = +1 leaves of the middle during tz = +1,
// so that only the rest of the middle is waited for. With a smaller ring the last part takes the slots of the first
// (docs/cuda.md draws it).
#pragma once

#include "../elements.h"
#include "lattice.h"

namespace autofocus::cuda {

// Source channels of a packed point: eight of 16 bits, four floats.
template <typename T>
constexpr int kChunk = kPointBytes / int(sizeof(T));
// The attention of a point.
template <typename T>
constexpr int kGateBytes = kLatticeBranches * int(sizeof(T));

template <typename T>
struct alignas(kGateBytes<T>) Gates {
  Pair<T> pairs[kLatticeBranches / 2];
};

// The elements of a packed point, and back, rounded once.
template <typename T>
__device__ inline void unpack_point(const uint4& point, float (&values)[kChunk<T>]) {
  const uint32_t words[4] = {point.x, point.y, point.z, point.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      values[i] = float_of(words[i]);
    } else {
      const float2 pair = unpack(words[i], T{});
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}
template <typename T>
__device__ inline uint4 packed_point(const float (&values)[kChunk<T>]) {
  if constexpr (std::is_same_v<T, float>)
    return {tf32(values[0]), tf32(values[1]), tf32(values[2]), tf32(values[3])};
  else
    return {pack(values[0], values[1], T{}), pack(values[2], values[3], T{}), pack(values[4], values[5], T{}),
            pack(values[6], values[7], T{})};
}

// This thread's points of planes [first, last) of the block, all in one part of it, in pass `pass` of a cover, one
// after the other. Beside the products this is what a kernel executes most: what is the same in all planes is found
// once.
class Points {
 public:
  __device__ Points(const Lattice& lattice, const Tile& tile, const Cover& cover, int pass, int first, int last)
      : lattice_(lattice), cover_(cover) {
    const int thread = reread_thread(), line = divided(thread, cover.by_columns), plane = divided(line, cover.by_rows);
    const int row = line - plane * cover.rows + pass * cover.rows;
    const int block_row = lattice.halo.y - cover.halo.y + row,
              block_column = lattice.halo.x - cover.halo.x + thread - line * cover.columns;
    left_ = plane < cover.planes && row < kTileY + 2 * cover.halo.y ? last - first - plane : 0;
    source_plane_ = tile.source_first.z + first + plane;
    line_there_ =
        has_row(lattice, tile.source_first, block_row) && has_column(lattice, tile.source_first, block_column);
    index_ = packed_index(lattice, tile, first + plane, block_row, block_column);
    place_ = slot(lattice, first + plane) * plane_size(lattice) + block_row * kPitch + block_column;
  }

  __device__ bool more() const { return left_ > 0; }
  // Where the point goes in shared memory, in points.
  __device__ int place() const { return place_; }
  // Whether the source has it; if so, its number among the packed points.
  __device__ bool there() const { return line_there_ && uint32_t(source_plane_) < uint32_t(lattice_.points.z); }
  __device__ int index() const { return index_; }

  __device__ void advance() {
    left_ -= cover_.planes;
    source_plane_ += cover_.planes;
    index_ += cover_.source_step;
    place_ += cover_.shared_step;
  }

 private:
  const Lattice& lattice_;
  const Cover& cover_;
  int left_, source_plane_, index_, place_;
  bool line_there_;
};

// Copies points as they are: chunk c of `points` [N, chunks_held, packed points], beginning again after the last one
// held.
struct CopyPoints {
  const unsigned char* points;
  int chunks_held;

  __device__ void operator()(const Lattice& lattice, const Tile& tile, const Cover& cover, int chunk, int first,
                             int last) const {
    const int64_t plane = tile.n * chunks_held + chunk % chunks_held;
    for (int pass = 0; pass < cover.passes; ++pass) {
      Points walk(lattice, tile, cover, pass, first, last);
      const unsigned char* from = points + (plane * packed_points(lattice) + walk.index()) * kPointBytes;
      for (; walk.more(); walk.advance(), from += int64_t(cover.source_step) * kPointBytes)
        copy_async<kPointBytes>(shared_memory() + walk.place() * kPointBytes, from, walk.there());
    }
  }
};

// Which branches read a chunk: all of them, or one each in turn. Then chunk c belongs to branch c % K.
enum class Readers { kAll, kOne };

// What a block works through, tiles number blockIdx.x, blockIdx.x + gridDim.x, ... and in each `chunks` chunks, and the
// writing that runs ahead of the products.
//
// Every thread calls every method: start, then for each chunk {enter, ahead, leave} for tz = -1, 0, 1 and advance.
// Products of tz are begun behind enter and waited for before leave, in front of ahead, around it or behind.
// `stage(lattice, tile, halo, chunk, first, last)` writes planes; what a kernel copies beside, it copies in the
// functions that start and leave take, and that is there from the next chunk's enter(-1) on.
template <Readers kReaders, typename Stage>
class Pipeline {
 public:
  __device__ Pipeline(const Lattice& lattice, int chunks, const Stage& stage)
      : lattice_(lattice),
        stage_(stage),
        chunks_(chunks),
        tiles_(int(num_tiles(lattice))),
        tile_(int(blockIdx.x)),
        chunk_(0),
        parity_(0) {}

  __device__ bool running() const { return tile_ < tiles_; }
  __device__ int chunk() const { return chunk_; }
  __device__ bool last_chunk() const { return chunk_ + 1 == chunks_; }
  __device__ int next_chunk() const { return last_chunk() ? 0 : chunk_ + 1; }
  __device__ const Tile& tile() const { return shared_tile(parity_); }
  // Where shared memory behind the pipeline's own begins.
  __device__ int behind() const { return lattice_.ring_bytes + 2 * int(sizeof(Tile)); }

  template <typename Copies>
  __device__ void start(const Copies& copies) {
    if (threadIdx.x == 0 && running()) shared_tile(0) = tile_at(lattice_, tile_);
    __syncthreads();
    if (!running()) return;
    copies();
    write(Section::kFirst, false);
    write(Section::kMiddle, false);
    copy_async_commit();
  }

  __device__ void enter(int tz) {
    if (tz == 0) return;
    if (tz > 0 && !recycles())
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
    fence_shared_operands();
    __syncthreads();
    // Decoding a tile number takes a dozen divisions: one thread does it, once a tile, when all are done with the last.
    if (tz < 0 && chunk_ == 0 && threadIdx.x == 0 && tile_ + int(gridDim.x) < tiles_)
      shared_tile(1 - parity_) = tile_at(lattice_, tile_ + int(gridDim.x));
  }

  __device__ void ahead(int tz) {
    if (tz < 0) {
      if (!recycles()) write(Section::kLast, false);
      copy_async_commit();
    } else if (tz == 0) {
      recycles() ? write(Section::kLast, false) : write(Section::kFirst, true);
      copy_async_commit();
    } else {
      write(Section::kFreeMiddle, true);
    }
  }

  template <typename Copies>
  __device__ void leave(int tz, const Copies& copies) {
    if (tz == 0) return;
    __syncthreads();
    copies();
    if (tz < 0) return;
    if (recycles()) write(Section::kFirst, true);
    write(Section::kOtherMiddle, true);
    copy_async_commit();
  }

  __device__ void advance() {
    if (!last_chunk()) {
      ++chunk_;
      return;
    }
    chunk_ = 0;
    tile_ += int(gridDim.x);
    parity_ = 1 - parity_;
  }

 private:
  enum class Section { kFirst, kMiddle, kFreeMiddle, kOtherMiddle, kLast };

  __device__ Tile& shared_tile(int parity) const {
    return *reinterpret_cast<Tile*>(shared_memory() + lattice_.ring_bytes + parity * int(sizeof(Tile)));
  }
  __device__ bool recycles() const { return lattice_.ring < planes(lattice_); }

  __device__ const Cover& cover(int chunk) const {
    return lattice_.cover[kReaders == Readers::kAll ? kLatticeBranches : chunk % lattice_.K];
  }
  // Planes at the middle's beginning that tz = +1 of this chunk does not read.
  __device__ int free_planes() const {
    int free = lattice_.tile_z;
    for (int k = 0; k < lattice_.K; ++k)
      if ((kReaders == Readers::kAll || k == chunk_ % lattice_.K) && lattice_.rate[k].z < free)
        free = lattice_.rate[k].z;
    return free;
  }

  // A section of the planes of this chunk, or of the next one.
  __device__ void write(Section section, bool of_next) {
    const bool next_tile = of_next && last_chunk();
    if (next_tile && tile_ + int(gridDim.x) >= tiles_) return;
    const int chunk = of_next ? next_chunk() : chunk_;
    const Cover& own = cover(chunk);
    const int middle = lattice_.halo.z, end = middle + lattice_.tile_z;
    int first = middle, last = end;
    if (section == Section::kFirst) first = middle - own.halo.z, last = middle;
    if (section == Section::kFreeMiddle) last = middle + free_planes();
    if (section == Section::kOtherMiddle) first = middle + free_planes();
    if (section == Section::kLast) first = end, last = end + own.halo.z;
    stage_(lattice_, shared_tile(next_tile ? 1 - parity_ : parity_), own, chunk, first, last);
  }

  const Lattice& lattice_;
  const Stage& stage_;
  int chunks_;
  int tiles_, tile_;  // a device has no memory for 2^31 tiles
  int chunk_, parity_;
};

}  // namespace autofocus::cuda
