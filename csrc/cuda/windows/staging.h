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

// What is written at a time: a chunk of channels in planes [first, last) of the block under a tile, within the halo of
// a cover; all branches read it, or `branch`.
struct Planes {
  const Tile& tile;
  const Cover& cover;
  int chunk, branch, first, last;
};

// A thread's way through the points of a block in one pass of a cover, plane by plane. Beside the products this is what
// a kernel executes most: what is the same in all planes is found once, and planes that follow are gone on to.
class Walk {
 public:
  Walk() = default;
  __device__ Walk(const Lattice& lattice, const Planes& planes, int pass) {
    const Tile& tile = planes.tile;
    const Cover& cover = planes.cover;
    const int thread = reread_thread(), line = divided(thread, cover.by_columns), plane = divided(line, cover.by_rows);
    const int row = line - plane * cover.rows + pass * cover.rows;
    const int block_row = lattice.halo.y - cover.halo.y + row,
              block_column = lattice.halo.x - cover.halo.x + thread - line * cover.columns;
    plane_ = plane < cover.planes && row < kTileY + 2 * cover.halo.y ? planes.first + plane : kFar;
    source_first_ =
        has_row(lattice, tile.source_first, block_row) && has_column(lattice, tile.source_first, block_column)
            ? tile.source_first.z
            : -2 * kFar;
    index_ = packed_index(lattice, tile, planes.first + plane, block_row, block_column);
    place_ = slot(lattice, planes.first + plane) * plane_size(lattice) + block_row * kPitch + block_column;
  }

  // Whether there is one more in these planes, and how many are.
  __device__ bool more(const Planes& planes) const { return plane_ < planes.last; }
  __device__ int left(const Planes& planes) const {
    return more(planes) ? divided(planes.last - plane_ + planes.cover.planes - 1, planes.cover.by_planes) : 0;
  }
  // Where the point goes in shared memory, in points.
  __device__ int place() const { return place_; }
  // Whether the source has it; if so, its number among the packed points.
  __device__ bool there(const Lattice& lattice) const {
    return uint32_t(plane_ + source_first_) < uint32_t(lattice.points.z);
  }
  __device__ int index() const { return index_; }

  __device__ void advance(const Cover& cover, int count = 1) {
    plane_ += count * cover.planes;
    index_ += count * cover.source_step;
    place_ += count * cover.shared_step;
  }

 private:
  static constexpr int kFar = 1 << 29;  // behind every plane

  int plane_, source_first_, index_, place_;
};

// Copies points as they are: chunk c of `points` [N, chunks_held, packed points], beginning again after the last one
// held.
class CopyPoints {
 public:
  static constexpr bool kReadsAhead = false;

  __device__ CopyPoints(const unsigned char* points, int chunks_held) : points_(points), chunks_held_(chunks_held) {}

  __device__ void begin(const Lattice& lattice, const Planes& planes) {
    begin_chunk(lattice, planes.tile, planes.chunk % chunks_held_);
  }
  __device__ void write(const Lattice& lattice, const Planes& planes, Walk& walk) const {
    for (; walk.more(planes); walk.advance(planes.cover))
      copy_async<kPointBytes>(shared_memory() + walk.place() * kPointBytes, from_ + int64_t(walk.index()) * kPointBytes,
                              walk.there(lattice));
  }

 protected:
  __device__ void begin_chunk(const Lattice& lattice, const Tile& tile, int chunk) {
    from_ = points_ + (tile.n * chunks_held_ + chunk) * lattice.packed_points * kPointBytes;
  }

 private:
  const unsigned char* points_;
  int chunks_held_;
  const unsigned char* from_;
};

// Which branches read a block of points: all of them, or one each in turn.
enum class Readers { kAll, kOne };

// A chunk of channels, and if branches read in turn one of them, else 0.
struct Turn {
  int chunk, branch;
};

// What a block works through, tiles number blockIdx.x, blockIdx.x + gridDim.x, ... and in each `chunks` chunks of
// channels and, if branches read in turn, in each of these all branches; and the writing that runs ahead of the
// products.
//
// Every thread calls every method: start, then in each turn {enter, ahead, leave} for tz = -1, 0, 1 and advance.
// Products of tz are begun behind enter and waited for before leave, in front of ahead, around it or behind.
// `stage.begin(lattice, planes)` is called once for the planes of a turn, or more often, and `stage.write(lattice,
// planes, walk)` writes some of them. A stage that waits for what it reads may read ahead: for planes that cannot be
// written yet `stage.read(lattice, planes, walk)` is called while products run, and then, behind them,
// `stage.write_read(lattice, planes, walk)`. What a kernel copies beside, it copies in the functions that start and
// leave take, and that is there from the next turn's enter(-1) on.
template <Readers kReaders, typename Stage>
class Pipeline {
 public:
  __device__ Pipeline(const Lattice& lattice, int chunks, Stage& stage)
      : lattice_(lattice),
        stage_(stage),
        chunks_(chunks),
        tiles_(int(num_tiles(lattice))),
        tile_(int(blockIdx.x)),
        turn_{0, 0},
        parity_(0) {}

  __device__ bool running() const { return tile_ < tiles_; }
  __device__ const Turn& turn() const { return turn_; }
  __device__ bool first_turn() const { return turn_.chunk == 0 && turn_.branch == 0; }
  __device__ bool last_turn() const { return turn_.chunk + 1 == chunks_ && turn_.branch + 1 == branches(); }
  __device__ Turn next_turn() const {
    if (turn_.branch + 1 < branches()) return {turn_.chunk, turn_.branch + 1};
    return {turn_.chunk + 1 == chunks_ ? 0 : turn_.chunk + 1, 0};
  }
  __device__ const Tile& tile() const { return shared_tile(parity_); }
  // Where shared memory behind the pipeline's own begins.
  __device__ int behind() const { return lattice_.ring_bytes + 2 * int(sizeof(Tile)); }

  template <typename Copies>
  __device__ void start(const Copies& copies) {
    if (threadIdx.x == 0 && running()) shared_tile(0) = tile_at(lattice_, tile_);
    __syncthreads();
    if (!running()) return;
    copies();
#pragma unroll 1
    for (int part = 0; part < 2; ++part) write(part == 0 ? Section::kFirst : Section::kMiddle, false);
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
    if (tz < 0 && first_turn() && threadIdx.x == 0 && tile_ + int(gridDim.x) < tiles_)
      shared_tile(1 - parity_) = tile_at(lattice_, tile_ + int(gridDim.x));
  }

  __device__ void ahead(int tz) {
    // One call for the three: all of the writing is in line, and the kernel is to fit the cache of instructions.
    if (tz >= 0 || !recycles()) {
      const bool of_this = (tz < 0) != recycles();
      write(tz > 0 ? Section::kFreeMiddle : of_this ? Section::kLast : Section::kFirst, tz > 0 || !of_this);
    }
    if (tz <= 0) copy_async_commit();
    if constexpr (Stage::kReadsAhead)
      if (tz > 0)
        with(Section::kOtherMiddle, true,
             [&](const Planes& planes, const Walk& walk) { stage_.read(lattice_, planes, walk); });
  }

  template <typename Copies>
  __device__ void leave(int tz, const Copies& copies) {
    if (tz == 0) return;
    __syncthreads();
    copies();
    if (tz < 0) return;
    with(Section::kOtherMiddle, true, [&](const Planes& planes, Walk& walk) {
      if constexpr (Stage::kReadsAhead)
        stage_.write_read(lattice_, planes, walk);
      else
        stage_.write(lattice_, planes, walk);
    });
    if (recycles()) write(Section::kFirst, true);
    copy_async_commit();
  }

  __device__ void advance() {
    if (last_turn()) {
      tile_ += int(gridDim.x);
      parity_ = 1 - parity_;
    }
    turn_ = next_turn();
  }

 private:
  enum class Section { kFirst, kMiddle, kFreeMiddle, kOtherMiddle, kLast };

  __device__ Tile& shared_tile(int parity) const {
    return *reinterpret_cast<Tile*>(shared_memory() + lattice_.ring_bytes + parity * int(sizeof(Tile)));
  }
  __device__ bool recycles() const { return lattice_.ring < planes(lattice_); }

  __device__ int branches() const { return kReaders == Readers::kAll ? 1 : lattice_.K; }
  __device__ const Cover& cover(const Turn& turn) const {
    return lattice_.cover[kReaders == Readers::kAll ? kLatticeBranches : turn.branch];
  }
  // Planes at the middle's beginning that tz = +1 of this turn does not read.
  __device__ int free_planes() const {
    if (kReaders == Readers::kOne) return least(lattice_.tile_z, lattice_.rate[turn_.branch].z);
    int free = lattice_.tile_z;
    for (int k = 0; k < lattice_.K; ++k) free = least(free, lattice_.rate[k].z);
    return free;
  }
  static __device__ int least(int a, int b) { return a < b ? a : b; }

  // Calls use(planes, walk) for a section of the planes of this turn, or of the next one, if there is one; pass by
  // pass.
  template <typename Use>
  __device__ void with(Section section, bool of_next, const Use& use) {
    const bool next_tile = of_next && last_turn();
    if (next_tile && tile_ + int(gridDim.x) >= tiles_) return;
    const Turn turn = of_next ? next_turn() : turn_;
    const Cover& own = cover(turn);
    const int middle = lattice_.halo.z, end = middle + lattice_.tile_z;
    int first = middle, last = end;
    if (section == Section::kFirst) first = middle - own.halo.z, last = middle;
    if (section == Section::kFreeMiddle) last = middle + free_planes();
    if (section == Section::kOtherMiddle) first = middle + free_planes();
    if (section == Section::kLast) first = end, last = end + own.halo.z;
    const Planes planes{shared_tile(next_tile ? 1 - parity_ : parity_), own, turn.chunk, turn.branch, first, last};
    // A walk goes on where it is, but for the first planes of a turn and those of a ring that come in another order.
    const bool begins =
        section == Section::kFirst || (recycles() && (section == Section::kFreeMiddle || section == Section::kLast));
    if (begins) stage_.begin(lattice_, planes);
    for (int pass = 0; pass < own.passes; ++pass) {
      if (begins || own.passes > 1) walk_ = Walk(lattice_, planes, pass);
      use(planes, walk_);
    }
  }
  __device__ void write(Section section, bool of_next) {
    with(section, of_next, [&](const Planes& planes, Walk& walk) { stage_.write(lattice_, planes, walk); });
  }

  const Lattice& lattice_;
  Stage& stage_;
  int chunks_;
  int tiles_, tile_;  // a device has no memory for 2^31 tiles
  Turn turn_;
  int parity_;
  Walk walk_;
};

}  // namespace autofocus::cuda
