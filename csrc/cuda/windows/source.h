// The packed points that a pass reads, and their way to shared memory: where the GPU has a copy engine some threads ask
// it for a plane at a time, elsewhere every thread copies its points.
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

// A chunk of channels, and if branches read in turn one of them, else 0.
struct Turn {
  int chunk, branch;
};

// The packed points that a pass reads, [N, held, packed points], and which of those held a turn reads: the chunks of a
// branch lie behind each other, and where output channels are taken in turn a pass goes through them again.
struct Source {
  const unsigned char* points;
  int held, first, chunks;

  __device__ int64_t volume(const Tile& tile, const Turn& turn) const {
    return tile.n * held + first + turn.branch * chunks + turn.chunk % chunks;
  }
};

// For the copy engine: a plane of the points that a branch reads, or all of them.
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

// What is written at a time: planes [first, last) of those that a turn holds under a tile, the first to slot `slot` of
// the ring.
struct Planes {
  const Tile& tile;
  Turn turn;
  int first, last, slot;
};

// On a GPU that has the engine the first threads of some warps share the planes: those of one warpgroup, whose products
// wait for all of them, while the other warpgroups multiply.
constexpr int kWriters = 4;
__device__ inline bool is_writer() { return reread_thread() % 32 == 0 && reread_thread() / 32 < kWriters; }

// `landed` has to expect bytes_of(...).
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

// A thread's way through the points of a block in one pass of a cover, plane by plane. Beside the products this is what
// a kernel without the engine executes most: what is the same in all planes is found once, and planes that follow are
// gone on to.
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

  // Copies this thread's points of `planes` from the packed ones of their volume.
  __device__ void copy(const Lattice& lattice, const Planes& planes, const unsigned char* from) {
    const Cover& cover = lattice.cover[planes.turn.branch];
    const int ring_points = lattice.ring * lattice.plane_points;
    for (; plane_ < planes.last; plane_ += cover.planes) {
      if (place_ >= ring_points) place_ -= ring_points;
      const bool there = uint32_t(plane_ + source_first_) < uint32_t(lattice.points.z);  // if not, zeros are read
      copy_async<kPointBytes>(shared_memory() + place_ * kPointBytes, from + int64_t(index_) * kPointBytes, there);
      index_ += cover.source_step;
      place_ += cover.shared_step;
    }
  }

 private:
  static constexpr int kFar = 1 << 29;  // behind every plane

  int plane_, source_first_, index_, place_;
};

}  // namespace autofocus::cuda
