// Pipeline: when each plane of points and each slab of the weight is copied to shared memory, and who waits for it. The
// kernels of all passes of the fast tier are loops around it.
//
// A thread block works through a queue of planes, turn after turn and tile after tile. A turn is a chunk of channels
// (in the adjoint: of one branch). Its phases tz = -1, 0, +1 read its planes in ascending order (docs/cuda.md draws
// it). A ring of slots holds the planes read now and as many of the following ones as there is room for. A plane is
// written as soon as the plane that had its slot is no longer read, even if it belongs to the next turn or tile.
#pragma once

#include "source.h"

namespace autofocus::cuda {

// Which branches read the planes of a turn, and so when a kernel waits for them at tz = -1: all at once (one wait for
// all planes), all one by one (a wait before each branch), or one branch only, the turn's (the adjoint).
enum class Readers { kAtOnce, kOneByOne, kOne };

// How a kernel reads them: as operands of window_product (product.h), or by plain loads on every GPU.
enum class Reads { kByProduct, kPlain };

// The barriers of one turn's bulk copies: one for each wait for planes, one for the slabs of tz = -1 and 0, one for the
// slab of tz = +1. Turns use two sets alternately, so a barrier ends one phase every other turn. With a single set, the
// next turn's copies could end a second phase while a slow thread still waits for the first.
constexpr int kFirstSlabs = kMaxWaits, kLastSlab = kMaxWaits + 1, kTurnBarriers = kMaxWaits + 2;

// Bytes of shared memory of a pipeline: the ring, two tiles (this and the next), two sets of barriers.
AUTOFOCUS_HD inline int pipeline_bytes(const Lattice& lattice) {
  return lattice.ring_bytes + 2 * int(sizeof(Tile)) + 2 * kTurnBarriers * int(sizeof(CopyBarrier));
}

// The turns of a thread block, and the copies that run ahead of them. The block takes every gridDim.x-th tile, from
// blockIdx.x on. A tile has `chunks` chunks, and with Readers::kOne each chunk has a turn for every branch.
//
// All threads call all methods in the same order: start; in each turn enter and ahead for tz = -1, 0, 1, then advance;
// finish only if shared memory is used for something else afterwards. A thread begins the products of phase tz after
// enter(tz) and waits for them before the next enter; ahead(tz) may come before, between or after them. With kOneByOne
// it calls enter_branch before the products of each branch.
//
// `slabs(turn, first, last)` copies slabs [first, last) of the weight by copy(), if the pass has one. Slabs 0 and 1 (tz
// = -1 and 0) are copied during tz = +1 of the turn before, slab 2 during tz = -1 of its own turn.
//
// What makes it safe to overwrite something: enter begins with a barrier of the block (if frees(tz)), at which every
// thread has finished the products of the phases before. From then on nobody reads the planes before first_read(tz) or
// the slabs of those phases and, in the first turn of a tile, nobody reads the Tile before.
//
// What makes a wait enough: every thread waits for every barrier once in a turn, and the copies of turn n + 2, which
// use the barriers of turn n again, are asked for after the block's barrier in enter(-1) of turn n + 1. So each barrier
// is at most one phase further than a thread waits for, and a phase number modulo 2 tells them apart.
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

  // Where the shared memory behind the pipeline's own begins, in bytes.
  __device__ int behind() const { return pipeline_bytes(lattice_); }
  // The slot of a plane, from first_read of the current phase up to one ring further.
  __device__ int slot(int plane) const {
    const int slot = plane + shift_;
    return slot < lattice_.ring ? slot : slot - lattice_.ring;
  }

  // Sets up the barriers and the first tile. The planes of the first turn are written by its first enter.
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

  // Begins phase tz. Afterwards its slabs and planes have landed, but for the planes that enter_branch waits for.
  template <typename Slabs>
  __device__ void enter(int tz, const Slabs& slabs) {
    if (first_read(lattice_, turn_.branch, tz) + shift_ >= lattice_.ring) shift_ -= lattice_.ring;
    if (frees(tz)) {
      // Orders this thread's ordinary reads before the copy engine's writes to the same slots and slabs. Warpgroup MMA
      // reads through the proxy that the engine writes through, so there waiting for the products is enough.
      if (has_bulk_copies() && (kReads == Reads::kPlain || !has_warpgroup_mma())) fence_proxies();
      if (!has_bulk_copies()) copy_async_wait<0>();
      __syncthreads();
      // Finding a tile takes six divisions, so one thread does it for all. The others first read this Tile after
      // another barrier: see ahead.
      if (tz < 0 && first_turn() && threadIdx.x == 0 && tile_ + int(gridDim.x) < tiles_)
        shared_tile(1 - parity_) = tile_at(lattice_, tile_ + int(gridDim.x));
      if (tz < 0) copy_slabs(slabs, kLastSlab, turns_, turn_);
      if (tz > 0 && has_next()) copy_slabs(slabs, kFirstSlabs, turns_ + 1, next_turn());
      // What ahead had no room for: in the first turn everything, later on if the ring is short.
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

  // Waits for the planes of the i-th branch, in the order of branch_in_turn. Only tz = -1 has such waits.
  __device__ void enter_branch(int tz, int i) {
    if (kReaders == Readers::kOneByOne && has_bulk_copies() && tz < 0) wait(i);
  }

  // Writes as many of the following planes as have free slots.
  __device__ void ahead(int tz) {
    if (!frees(tz)) return;
    int end = first_read(lattice_, turn_.branch, tz) + lattice_.ring;
    // In a tile's only turn, tz = -1 must not write for the next tile: thread 0 has just found that, and no barrier of
    // the block has made it known to the others yet.
    if (tz < 0 && first_turn() && last_turn() && end > held()) end = held();
    write(end);
  }

  // For `slabs`: copies `bytes` bytes to offset `to` in shared memory, all of them multiples of 16, `from` included.
  // All threads call it; with a copy engine thread 0 does it alone.
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

  // After the last turn: from the block's next barrier on, all of shared memory may be used for something else. No copy
  // is under way, since every plane and slab has been waited for.
  __device__ void finish() {
    __syncthreads();
    if (has_bulk_copies() && threadIdx.x == 0) {
#pragma unroll 1
      for (int i = 0; i < 2 * kTurnBarriers; ++i) end_barrier(barrier(0, i));
    }
  }

  // Goes to the next turn.
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
  // Whether enter(tz) has a barrier of the block, which frees the slots that tz does not read any more. It is left out
  // before tz = 0 if the ring has a slot for every plane of the turn: then all of them have been asked for already.
  // Without a copy engine every phase needs the barrier, to see what other threads have copied.
  __device__ bool frees(int tz) const { return tz != 0 || !has_bulk_copies() || lattice_.ring < planes(lattice_); }

  // `which`: kFirstSlabs or kLastSlab of turn number `turns`. The barrier's phase ends even if `slabs` copies nothing.
  template <typename Slabs>
  __device__ void copy_slabs(const Slabs& slabs, int which, uint32_t turns, const Turn& turn) {
    slabs_landed_ = &barrier(turns, which);
    slabs(turn, which == kFirstSlabs ? 0 : 2, which == kFirstSlabs ? 2 : 3);
    if (!has_bulk_copies())
      copy_async_commit();
    else if (threadIdx.x == 0)
      arrive(*slabs_landed_);
  }

  // Writes the planes that are missing up to `end`, counted from the first plane of this turn. Those of the next turn
  // count on behind those of this one, and none are written further ahead.
  __device__ void write(int end) {
    // A loop instead of two calls: everything is inlined, and the kernel should fit the instruction cache.
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

  // By the writers: a plane is counted by the barrier of the first wait that needs it. Thread 0 tells each barrier the
  // bytes of all writers, and arrives with the last plane of a wait. The other writers' copies may be ahead of it: the
  // phase cannot end before thread 0 arrives, and has expected all of its bytes by then.
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
      // `planes` completes this wait. A wait for no planes of its own completes with the one before.
      if (reread_thread() == 0 && planes.first < end && end <= planes.last) arrive(landed);
    }
  }

  // By all threads, without a copy engine. With one pass a walk goes on where the last call ended; it begins anew with
  // the first plane of a turn.
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
  int tiles_, tile_;  // how many, and the number of this one; a device has no memory for 2^31 tiles
  Turn turn_;
  int parity_;      // which of the two Tiles in shared memory is this one
  uint32_t turns_;  // turns that are over
  // Planes are counted from this turn's first. Plane p has slot (p + shift_) modulo the ring, and `written_` planes
  // have been written or asked for; more than the turn has if some are the next turn's.
  int shift_, written_;
  CopyBarrier* slabs_landed_;  // counts what copy() copies
  Walk walk_;
};

}  // namespace autofocus::cuda
