// The points under a tile on their way through shared memory: a queue of planes, which a block reads turn after turn
// and tile after tile.
//
// A turn is a chunk of channels, and where branches read in turn one of them. It reads its planes in the order in which
// they lie, tz = -1, 0, +1 (docs/cuda.md draws it), and a ring of slots holds what is read now and as much of what
// follows as there is room for: a plane is written once the one that had its slot is no longer read, whichever turn or
// tile it is of.
#pragma once

#include "source.h"

namespace autofocus::cuda {

// Which branches read a block of points: all of them at once or one after the other, or in the adjoint one each in turn
// (Lattice::sources).
enum class Readers { kAtOnce, kOneByOne, kOne };

// How: by the product of windows, or by plain loads on every GPU.
enum class Reads { kByProduct, kPlain };

// Barriers of bulk copies, each of which ends a phase every other turn: one for each wait for planes, and the slabs of
// the weight that are read from tz = -1 on and at tz = +1. The next turn's are others, since its copies may land while
// somebody still has to look at this turn's.
constexpr int kFirstSlabs = kMaxWaits, kLastSlab = kMaxWaits + 1, kTurnBarriers = kMaxWaits + 2;

// Shared memory of a pipeline: the points, two tiles and two turns' barriers.
AUTOFOCUS_HD inline int pipeline_bytes(const Lattice& lattice) {
  return lattice.ring_bytes + 2 * int(sizeof(Tile)) + 2 * kTurnBarriers * int(sizeof(CopyBarrier));
}

// What a block works through, tiles number blockIdx.x, blockIdx.x + gridDim.x, ... and in each `chunks` chunks of
// channels and, if branches read in turn, in each of these all branches; and the copying that runs ahead of the
// products.
//
// Every thread calls every method: start, then in each turn {enter, ahead} for tz = -1, 0, 1 and advance; finish before
// shared memory is used otherwise. Products of tz are begun behind enter and waited for before the next one, in front
// of ahead, around it or behind; with kOneByOne those of a branch at tz = -1 behind enter_branch.
//
// `slabs(turn, first, last)` copies slabs of the weight by copy(), if there is one. Those of tz = -1 and 0 are copied
// during tz = +1 of the turn before, that of tz = +1 during tz = -1.
template <Readers kReaders, Reads kReads = Reads::kByProduct>
class Pipeline {
 public:
  __device__ Pipeline(const Lattice& lattice, const Source& source, const SourcePlanes& maps, int chunks)
      : lattice_(lattice),
        source_(source),
        maps_(maps),
        chunks_(chunks),
        tiles_(int(num_tiles(lattice))),
        tile_(int(blockIdx.x)),
        turn_{0, 0},
        parity_(0),
        turns_(0),
        shift_(0),
        written_(0) {}

  __device__ bool running() const { return tile_ < tiles_; }
  __device__ const Turn& turn() const { return turn_; }
  __device__ bool first_turn() const { return turn_.chunk == 0 && turn_.branch == 0; }
  __device__ bool last_turn() const { return turn_.chunk + 1 == chunks_ && turn_.branch + 1 == branches(); }
  __device__ const Tile& tile() const { return shared_tile(parity_); }

  // Where shared memory behind the pipeline's own begins.
  __device__ int behind() const { return pipeline_bytes(lattice_); }
  // Of a plane that the current tz reads.
  __device__ int slot(int plane) const {
    const int slot = plane + shift_;
    return slot < lattice_.ring ? slot : slot - lattice_.ring;
  }

  template <typename Slabs>
  __device__ void start(const Slabs& slabs) {
    if (threadIdx.x == 0) {
      if (has_bulk_copies())
        for (int source = 0; source < branches(); ++source) prefetch_map(maps_.of[source]);
      if (running()) shared_tile(0) = tile_at(lattice_, tile_);
      if (has_bulk_copies()) {
#pragma unroll 1
        for (int i = 0; i < 2 * kTurnBarriers; ++i) init_barrier(barrier(0, i));
        fence_proxies();
      }
    }
    __syncthreads();
    if (running()) copy_slabs(slabs, kFirstSlabs, turns_, turn_);
  }

  template <typename Slabs>
  __device__ void enter(int tz, const Slabs& slabs) {
    if (first_read(lattice_, turn_.branch, tz) + shift_ >= lattice_.ring) shift_ -= lattice_.ring;
    if (frees(tz)) {
      if (has_bulk_copies() && (kReads == Reads::kPlain || !has_warpgroup_mma())) fence_proxies();
      if (!has_bulk_copies()) copy_async_wait<0>();
      __syncthreads();
      // Finding a tile takes six divisions: one thread does it, once a tile, when all are done with the last.
      if (tz < 0 && first_turn() && threadIdx.x == 0 && tile_ + int(gridDim.x) < tiles_)
        shared_tile(1 - parity_) = tile_at(lattice_, tile_ + int(gridDim.x));
      if (tz < 0) copy_slabs(slabs, kLastSlab, turns_, turn_);
      if (tz > 0 && has_next()) copy_slabs(slabs, kFirstSlabs, turns_ + 1, next_turn());
      if (written_ < end_read(lattice_, turn_.branch, tz)) {
        write(end_read(lattice_, turn_.branch, tz));
        if (!has_bulk_copies()) {
          copy_async_wait<0>();
          __syncthreads();
        }
      }
    }
    if (!has_bulk_copies()) return;
    if (tz != 0) wait(tz < 0 ? kFirstSlabs : kLastSlab);
    if (tz >= 0)
      wait(readers(lattice_) + tz);
    else if (kReaders != Readers::kOneByOne || !reads(lattice_, tz))
#pragma unroll 1
      for (int i = 0; i < readers(lattice_); ++i) wait(i);
  }

  // Before the products of the i-th branch at tz = -1, in the order of branch_in_turn.
  __device__ void enter_branch(int tz, int i) {
    if (kReaders == Readers::kOneByOne && has_bulk_copies() && tz < 0) wait(i);
  }

  // Writes what there is room for.
  __device__ void ahead(int tz) {
    if (!frees(tz)) return;
    int end = first_read(lattice_, turn_.branch, tz) + lattice_.ring;
    // If this turn is the tile's only one, others do not know the next tile before they have met again.
    if (tz < 0 && first_turn() && last_turn() && end > held()) end = held();
    write(end);
  }

  // Copies a multiple of 16 bytes, at multiples of 16, to shared memory.
  __device__ void copy(int to, const unsigned char* from, int bytes) {
    if (has_bulk_copies()) {
      if (threadIdx.x > 0) return;
      expect_bytes(*slabs_landed_, bytes);
      copy_bulk(shared_memory() + to, from, bytes, *slabs_landed_);
    } else {
      for (int at = int(threadIdx.x) * 16; at < bytes; at += int(blockDim.x) * 16)
        copy_async<16>(shared_memory() + to + at, from + at, true);
    }
  }

  // Behind the last turn: from the next barrier on all of shared memory may be used for other things.
  __device__ void finish() {
    __syncthreads();
    if (has_bulk_copies() && threadIdx.x == 0) {
#pragma unroll 1
      for (int i = 0; i < 2 * kTurnBarriers; ++i) end_barrier(barrier(0, i));
    }
  }

  __device__ void advance() {
    shift_ += held();
    written_ -= held();
    ++turns_;
    if (last_turn()) {
      tile_ += int(gridDim.x);
      parity_ = 1 - parity_;
    }
    turn_ = next_turn();
  }

 private:
  __device__ Tile& shared_tile(int parity) const {
    return *reinterpret_cast<Tile*>(shared_memory() + lattice_.ring_bytes + parity * int(sizeof(Tile)));
  }
  __device__ CopyBarrier& barrier(uint32_t turn, int which) const {
    return reinterpret_cast<CopyBarrier*>(shared_memory() + lattice_.ring_bytes +
                                          2 * int(sizeof(Tile)))[turn % 2 * kTurnBarriers + which];
  }
  __device__ void wait(int which) const { wait_for_copies(barrier(turns_, which), turns_ / 2 % 2); }

  __device__ Turn next_turn() const {
    if (turn_.branch + 1 < branches()) return {turn_.chunk, turn_.branch + 1};
    return {turn_.chunk + 1 == chunks_ ? 0 : turn_.chunk + 1, 0};
  }
  __device__ bool has_next() const { return !last_turn() || tile_ + int(gridDim.x) < tiles_; }
  __device__ int branches() const { return kReaders == Readers::kOne ? lattice_.K : 1; }
  __device__ int held() const { return held_planes(lattice_, turn_.branch); }
  // Whether all threads meet in front of tz, so that what it does not read any more is free. In front of tz = 0 nothing
  // is gained by it if the turn's own planes all have their slots.
  __device__ bool frees(int tz) const { return tz != 0 || !has_bulk_copies() || lattice_.ring < planes(lattice_); }

  template <typename Slabs>
  __device__ void copy_slabs(const Slabs& slabs, int which, uint32_t turns, const Turn& turn) {
    slabs_landed_ = &barrier(turns, which);
    slabs(turn, which == kFirstSlabs ? 0 : 2, which == kFirstSlabs ? 2 : 3);
    if (!has_bulk_copies())
      copy_async_commit();
    else if (threadIdx.x == 0)
      arrive(*slabs_landed_);
  }

  // Writes the planes up to `end`, those of the next turn behind those of this one.
  __device__ void write(int end) {
    // One call for both: all of the writing is in line, and the kernel is to fit the cache of instructions.
#pragma unroll 1
    for (int later = 0; later < (has_next() ? 2 : 1); ++later) {
      const Turn turn = later ? next_turn() : turn_;
      const int before = later ? held() : 0, of_turn = before + held_planes(lattice_, turn.branch),
                last = end < of_turn ? end : of_turn;
      if (written_ >= last) continue;
      const Planes planes{shared_tile(later && last_turn() ? 1 - parity_ : parity_), turn, written_ - before,
                          last - before, slot(written_)};
      if (!has_bulk_copies())
        walk(planes);
      else if (is_writer())
        copy(planes, turns_ + later);
      written_ = last;
    }
    if (!has_bulk_copies()) copy_async_commit();
  }

  // Each plane is counted by the barrier of the first wait that it is for. Of the writers one says how many bytes come,
  // before or behind the others' copies: without its arrival no phase ends.
  __device__ void copy(const Planes& planes, uint32_t turns) {
    Planes part = planes;
#pragma unroll 1
    for (int i = 0; i < readers(lattice_) + 2; ++i) {
      const int end = lattice_.planes_read[planes.turn.branch][i];
      CopyBarrier& landed = barrier(turns, i);
      part.last = end < planes.last ? end : planes.last;
      if (part.first < part.last) {
        if (reread_thread() == 0) expect_bytes(landed, bytes_of(lattice_, part));
        copy_planes(lattice_, source_, maps_, part, landed);
        part.slot += part.last - part.first;
        if (part.slot >= lattice_.ring) part.slot -= lattice_.ring;
        part.first = part.last;
      }
      if (reread_thread() == 0 && planes.first < end && end <= planes.last) arrive(landed);  // that is all of it
    }
  }

  // By all threads, pass by pass. A walk goes on where it is, but for the first planes of a turn.
  __device__ void walk(const Planes& planes) {
    const unsigned char* from =
        source_.points + source_.volume(planes.tile, planes.turn) * lattice_.packed_points * kPointBytes;
    const int passes = lattice_.cover[planes.turn.branch].passes;
    for (int pass = 0; pass < passes; ++pass) {
      if (planes.first == 0 || passes > 1) walk_ = Walk(lattice_, planes, pass);
      walk_.copy(lattice_, planes, from);
    }
  }

  const Lattice& lattice_;
  const Source& source_;
  const SourcePlanes& maps_;
  int chunks_;
  int tiles_, tile_;  // a device has no memory for 2^31 tiles
  Turn turn_;
  int parity_;      // of the tile
  uint32_t turns_;  // that are over
  // Planes are counted from the turn's first: what the slot of one is more, modulo the ring, and how many are written.
  int shift_, written_;
  CopyBarrier* slabs_landed_;
  Walk walk_;
};

}  // namespace autofocus::cuda
