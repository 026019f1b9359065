// The packed points that a pass reads, and how planes of them get into shared memory. On a GPU with a copy engine four
// threads ask it for a plane each (copy_planes). Elsewhere every thread copies its own points (Walk). staging.h decides
// which planes, and when.
#pragma once

#include "../elements.h"
#include "lattice.h"

namespace autofocus::cuda {

// Channels of a chunk, the source channels of a packed point: eight of 16 bits, or four floats.
template <typename T>
constexpr int kChunk = kPointBytes / int(sizeof(T));
// Bytes of the attention of a point.
template <typename T>
constexpr int kGateBytes = kLatticeBranches * int(sizeof(T));

// The attention of a point, packed: an element for each branch of a slice, zero beyond the last one.
template <typename T>
struct alignas(kGateBytes<T>) Gates {
  Pair<T> pairs[kLatticeBranches / 2];
};

// What a thread block reads at a time: a chunk of channels and, in the adjoint, a branch (else 0).
struct Turn {
  int chunk, branch;
};

// The packed points that a pass reads, [N, held, packed points].
struct Source {
  const unsigned char* points;
  int held;    // sets of packed points of a sample: chunks, times branches in the adjoint
  int first;   // the first of them that is read
  int chunks;  // read from there on, for each branch

  // The set that a turn reads. grad_attention goes through the chunks once for each block of output channels, so
  // turn.chunk counts on beyond `chunks`.
  __device__ int64_t volume(const Tile& tile, const Turn& turn) const {
    return tile.n * held + first + turn.branch * chunks + turn.chunk % chunks;
  }
};

// Maps for the copy engine, by source. Each describes the same volumes, one for every sample, set and class; the copied
// box is a plane of the points held for that source.
struct SourcePlanes {
  PlaneMap of[kLatticeBranches];
};

inline SourcePlanes planes_of(const Lattice& lattice, const Source& source) {
  SourcePlanes planes{};
  if (!device_has_bulk_copies()) return planes;
  const int64_t volumes = lattice.N * source.held * volume(lattice.source_classes.count);
  for (int k = 0; k < lattice.sources; ++k)
    planes.of[k] = plane_map(source.points, volumes, lattice.points.z, lattice.points.y, lattice.points.x,
                             columns(lattice.reach[k]), rows(lattice.reach[k]));
  return planes;
}

// Planes to be written: [first, last) of those that a turn holds under a tile. The first one goes to slot `slot` of the
// ring, the others to the slots that follow.
struct Planes {
  const Tile& tile;
  Turn turn;
  int first, last, slot;
};

// With a copy engine, lane 0 of each of the first four warps asks for a share of the planes. These warps are one
// warpgroup, so only its products are delayed; the other warpgroups multiply meanwhile.
constexpr int kWriters = 4;
__device__ inline bool is_writer() { return reread_thread() % 32 == 0 && reread_thread() / 32 < kWriters; }

// The bytes that copy_planes brings altogether: its caller tells `landed` to expect them.
__device__ inline int bytes_of(const Lattice& lattice, const Planes& planes) {
  const int k = planes.turn.branch;
  return (planes.last - planes.first) * rows(lattice.reach[k]) * lattice.pitch[k] * kPointBytes;
}
__device__ inline void copy_planes(const Lattice& lattice, const Source& source, const SourcePlanes& maps,
                                   const Planes& planes, CopyBarrier& landed) {
  const Tile& tile = planes.tile;
  const int k = planes.turn.branch;
  const int x = tile.source_first.x + first_column(lattice, k), y = tile.source_first.y + first_row(lattice, k),
            z = tile.source_first.z + first_held(lattice, k);
  const int64_t classes = volume(lattice.source_classes.count),
                number = source.volume(tile, planes.turn) * classes + tile.source_volume;
  const int skipped = (reread_thread() / 32 - planes.first) & (kWriters - 1);
  int slot = planes.slot + skipped;
#pragma unroll 1
  for (int plane = planes.first + skipped; plane < planes.last; plane += kWriters, slot += kWriters) {
    if (slot >= lattice.ring) slot -= lattice.ring;
    copy_plane(shared_memory() + slot * lattice.plane_points * kPointBytes, maps.of[k], x, y, z + plane, int(number),
               landed);
  }
}

// Copying without a copy engine: a thread's way through the planes of a block in one pass of a Cover. After the
// products this is what such a kernel executes most. So what is the same in all planes is computed once, and later
// calls go on where the last one ended.
class Walk {
 public:
  Walk() = default;
  __device__ Walk(const Lattice& lattice, const Planes& planes, int pass) {
    const Tile& tile = planes.tile;
    const int k = planes.turn.branch;
    const Cover& cover = lattice.cover[k];
    const int thread = reread_thread(), line = divided(thread, cover.by_columns), plane = divided(line, cover.by_rows);
    const int row = line - plane * cover.rows + pass * cover.rows, column = thread - line * cover.columns;
    const int block_row = first_row(lattice, k) + row, block_column = first_column(lattice, k) + column;
    plane_ = plane < cover.planes && row < rows(lattice.reach[k]) ? planes.first + plane : kFar;
    source_first_ =
        has_row(lattice, tile.source_first, block_row) && has_column(lattice, tile.source_first, block_column)
            ? tile.source_first.z + first_held(lattice, k)
            : -2 * kFar;
    index_ = packed_index(lattice, tile, first_held(lattice, k) + planes.first + plane, block_row, block_column);
    place_ = (planes.slot + plane) * lattice.plane_points + row * lattice.pitch[k] + column;
  }

  // Copies this thread's points of `planes`; `from` is the set of packed points that the turn reads.
  __device__ void copy(const Lattice& lattice, const Planes& planes, const unsigned char* from) {
    const Cover& cover = lattice.cover[planes.turn.branch];
    const int ring_points = lattice.ring * lattice.plane_points;
    for (; plane_ < planes.last; plane_ += cover.planes) {
      if (place_ >= ring_points) place_ -= ring_points;
      const bool there = uint32_t(plane_ + source_first_) < uint32_t(lattice.points.z);  // else zeros
      copy_async<kPointBytes>(shared_memory() + place_ * kPointBytes, from + int64_t(index_) * kPointBytes, there);
      index_ += cover.source_step;
      place_ += cover.shared_step;
    }
  }

 private:
  static constexpr int kFar = 1 << 29;  // beyond every plane

  int plane_;         // the next plane to copy, of those held; kFar if this thread has no point
  int source_first_;  // the source plane of held plane 0; far outside if this thread's row or column is outside
  int index_;         // packed number of the next point
  int place_;         // where it goes, in points from the start of the ring; wraps at its end
};

}  // namespace autofocus::cuda
