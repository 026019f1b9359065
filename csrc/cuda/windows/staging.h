// The block of points under a tile, kept in shared memory while it is multiplied: which part is written when.
//
// A chunk has three phases, tz = -1, 0, +1, and its planes three parts. The first part is read by tz = -1 only, the
// last by tz = +1 only; the middle lies under the tile. With a slot for every plane the last part is written during the
// chunk's own tz = -1, the next chunk's first part during tz = 0 and what tz = +1 leaves of the middle during tz = +1,
// so that only the rest of the middle is waited for. With a smaller ring the last part takes the slots of the first
// (docs/cuda.md draws it).
#pragma once

#include "source.h"

namespace autofocus::cuda {

// Which branches read a block of points: all of them, or in the adjoint one each in turn (Lattice::sources).
enum class Readers { kAll, kOne };

// How: by the product of windows, or by plain loads on every GPU.
enum class Reads { kByProduct, kPlain };

// Shared memory of a pipeline: the points, two tiles and two barriers.
AUTOFOCUS_HD inline int pipeline_bytes(const Lattice& lattice) {
  return lattice.ring_bytes + 2 * int(sizeof(Tile)) + 2 * int(sizeof(CopyBarrier));
}

// What a block works through, tiles number blockIdx.x, blockIdx.x + gridDim.x, ... and in each `chunks` chunks of
// channels and, if branches read in turn, in each of these all branches; and the copying that runs ahead of the
// products.
//
// Every thread calls every method: start, then in each turn {enter, ahead, leave} for tz = -1, 0, 1 and advance; finish
// before shared memory is used otherwise. Products of tz are begun behind enter and waited for before leave, in front
// of ahead, around it or behind. What a kernel copies beside, it copies by copy() in the functions that start and leave
// take, and that is there from the next turn's enter(-1) on.
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
        phase_(0) {}

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
  __device__ int behind() const { return pipeline_bytes(lattice_); }

  template <typename Copies>
  __device__ void start(const Copies& copies) {
    if (threadIdx.x == 0) {
      if (has_bulk_copies())
        for (int source = 0; source < branches(); ++source) prefetch_map(maps_.of[source]);
      if (running()) shared_tile(0) = tile_at(lattice_, tile_);
      if (has_bulk_copies()) {
        init_barrier(barrier(kFromStart));
        init_barrier(barrier(kLastPart));
        fence_proxies();
      }
    }
    __syncthreads();
    if (!running()) return;
    copies();
#pragma unroll 1
    for (int part = 0; part < 2; ++part) write(part == 0 ? Section::kFirst : Section::kMiddle, false);
    commit();
  }

  __device__ void enter(int tz) {
    if (tz == 0) return;
    if (tz > 0) finish_reads();
    if (has_bulk_copies())
      wait_for_copies(barrier(tz < 0 ? kFromStart : kLastPart), phase_);
    else if (tz > 0 && !recycles())
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
    __syncthreads();
    // Finding a tile takes six divisions: one thread does it, once a tile, when all are done with the last.
    if (tz < 0 && first_turn() && threadIdx.x == 0 && tile_ + int(gridDim.x) < tiles_)
      shared_tile(1 - parity_) = tile_at(lattice_, tile_ + int(gridDim.x));
  }

  __device__ void ahead(int tz) {
    // One call for the three: all of the writing is in line, and the kernel is to fit the cache of instructions.
    if (tz >= 0 || !recycles()) {
      const bool of_this = (tz < 0) != recycles();
      write(tz > 0 ? Section::kFreeMiddle : of_this ? Section::kLast : Section::kFirst, tz > 0 || !of_this);
    }
    if (!has_bulk_copies() && tz <= 0) copy_async_commit();
  }

  template <typename Copies>
  __device__ void leave(int tz, const Copies& copies) {
    if (tz == 0) return;
    finish_reads();
    __syncthreads();
    if (has_next()) copies();
    if (tz < 0) return;
    write(Section::kOtherMiddle, true);
    if (recycles()) write(Section::kFirst, true);
    commit();
  }

  // Copies a multiple of 16 bytes, at multiples of 16, to shared memory.
  __device__ void copy(int to, const unsigned char* from, int bytes) {
    if (has_bulk_copies()) {
      if (threadIdx.x > 0) return;
      expect_bytes(barrier(kFromStart), bytes);
      copy_bulk(shared_memory() + to, from, bytes, barrier(kFromStart));
    } else {
      for (int at = int(threadIdx.x) * 16; at < bytes; at += int(blockDim.x) * 16)
        copy_async<16>(shared_memory() + to + at, from + at, true);
    }
  }

  // Behind the last turn: from the next barrier on all of shared memory may be used for other things.
  __device__ void finish() {
    if (!has_bulk_copies() || threadIdx.x > 0) return;
    end_barrier(barrier(kFromStart));
    end_barrier(barrier(kLastPart));
  }

  __device__ void advance() {
    if (last_turn()) {
      tile_ += int(gridDim.x);
      parity_ = 1 - parity_;
    }
    turn_ = next_turn();
    phase_ = 1 - phase_;
  }

 private:
  enum class Section { kFirst, kMiddle, kFreeMiddle, kOtherMiddle, kLast };
  // Barriers of bulk copies. Each ends a phase a turn: when what the turn reads from tz = -1 on has landed, and when
  // its last part has.
  enum { kFromStart, kLastPart };

  __device__ Tile& shared_tile(int parity) const {
    return *reinterpret_cast<Tile*>(shared_memory() + lattice_.ring_bytes + parity * int(sizeof(Tile)));
  }
  __device__ CopyBarrier& barrier(int which) const {
    return reinterpret_cast<CopyBarrier*>(shared_memory() + lattice_.ring_bytes + 2 * int(sizeof(Tile)))[which];
  }
  __device__ bool recycles() const { return lattice_.ring < planes(lattice_); }
  __device__ bool has_next() const { return !last_turn() || tile_ + int(gridDim.x) < tiles_; }

  __device__ int branches() const { return kReaders == Readers::kAll ? 1 : lattice_.K; }

  // Writes a section of the planes of this turn, or of the next one, if there is one.
  __device__ void write(Section section, bool of_next) {
    if (has_bulk_copies() && reread_thread() > 0) return;  // it is for one thread
    if (of_next && !has_next()) return;
    const Turn turn = of_next ? next_turn() : turn_;
    const int reach = lattice_.reach[turn.branch].z, middle = lattice_.halo.z, end = middle + lattice_.tile_z;
    int first = middle, last = end;
    if (section == Section::kFirst) first = middle - reach, last = middle;
    if (section == Section::kFreeMiddle) last = middle + lattice_.free_planes[turn_.branch];
    if (section == Section::kOtherMiddle) first = middle + lattice_.free_planes[turn_.branch];
    if (section == Section::kLast) first = end, last = end + reach;
    const Planes planes{shared_tile(of_next && last_turn() ? 1 - parity_ : parity_), turn, first, last};
    if (has_bulk_copies()) {
      CopyBarrier& landed = barrier(section == Section::kLast ? kLastPart : kFromStart);
      expect_bytes(landed, bytes_of(lattice_, planes));
      if (section == Section::kLast) arrive(landed);  // that is all of it; the other barrier expects more until commit
      copy_planes(lattice_, source_, maps_, planes, landed);
    } else {
      // A walk goes on where it is, but for the first planes of a turn and those of a ring that come in another order.
      const bool begins =
          section == Section::kFirst || (recycles() && (section == Section::kFreeMiddle || section == Section::kLast));
      walk(planes, begins);
    }
  }

  // In front of a barrier behind which points that were read are written over.
  __device__ void finish_reads() const {
    if (has_bulk_copies() && (kReads == Reads::kPlain || !has_warpgroup_mma())) fence_proxies();
  }

  // What is copied for a turn from tz = -1 on is complete.
  __device__ void commit() {
    if (!has_bulk_copies())
      copy_async_commit();
    else if (threadIdx.x == 0)
      arrive(barrier(kFromStart));
  }

  // By all threads, pass by pass.
  __device__ void walk(const Planes& planes, bool begins) {
    const unsigned char* from =
        source_.points + source_.volume(planes.tile, planes.turn) * lattice_.packed_points * kPointBytes;
    const int passes = lattice_.cover[planes.turn.branch].passes;
    for (int pass = 0; pass < passes; ++pass) {
      if (begins || passes > 1) walk_ = Walk(lattice_, planes, pass);
      walk_.copy(lattice_, planes, from);
    }
  }

  const Lattice& lattice_;
  const Source& source_;
  const SourcePlanes& maps_;
  int chunks_;
  int tiles_, tile_;  // a device has no memory for 2^31 tiles
  Turn turn_;
  int parity_;
  uint32_t phase_;
  Walk walk_;
};

}  // namespace autofocus::cuda
