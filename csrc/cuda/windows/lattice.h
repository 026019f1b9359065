// All index arithmetic of the fast tier: lattices, their tiles, which source points a tile reads, and where each tap
// finds them in shared memory (docs/cuda.md). Plain integers only, tested point by point on the host.
//
// A pass gathers: it computes positions of a target from positions of a source. Forward the target is the output and
// the source the input, in the adjoint it is the reverse. With stride 1 and all dilations of an axis multiples of
// `step`, the targets of one class modulo `step` read sources of one class only. Such a class is a lattice with small
// dilations: rate_k = dilation_k / step. A tile is tile_z x 8 x 8 target points of one class. The block of source
// points that it reads is larger by `halo`, the largest rate, on every side.
//
// On an axis with one tap a kernel is treated as three taps at rate zero, where the outer two have weights of zero (or
// sums that nobody reads). They read the same points as the middle one.
#pragma once

#include "../../geometry.h"

namespace autofocus::cuda {

constexpr int kLatticeBranches = 4;  // most branches of a slice: a lane has registers for a value of each
constexpr int kTileY = 8;
constexpr int kTileX = 8;                        // 8 points of 16 bytes use each of the 32 shared memory banks once
constexpr int kMaxHaloX = 7;                     // points
constexpr int kMaxRows = 256;                    // rows of a block: the limit of a bulk copy's box
constexpr int kPointBytes = 16;                  // a packed point: the channels of one chunk
constexpr int kPlaneAligned = 8;                 // points, 128 bytes: alignment of a plane that a bulk copy writes
constexpr int kPlaneTaps = 9;                    // taps (ty, tx) of one tz, tx fastest
constexpr int kTapPairs = 5;                     // a product takes two taps; the ninth has no second one
constexpr int kMaxWaits = kLatticeBranches + 2;  // waits for planes in a turn: each branch at tz = -1, tz = 0, tz = +1

struct Int3 {
  int z, y, x;
};

// The classes that a part works on: on each axis all of them, or one.
struct Classes {
  Int3 count, first;
};

// How the threads of a block copy a plane without the copy engine, a point each: `columns` x `rows` points of `planes`
// planes at once. If a plane has more rows than that, they go through all planes `passes` times.
struct Cover {
  int columns, rows, planes, passes;
  uint32_t by_columns, by_rows;  // inverses of columns and rows, for divided()
  int source_step, shared_step;  // points from a thread's point to its next, among packed ones and in shared memory
};

// The gather of one pass and part, as a kernel gets it. Arrays are by branch; those marked "by source" have one entry
// where all branches read the same source. Whatever holds for all classes is here, the rest is in Tile.
struct Lattice {
  int64_t N;    // samples of the part
  int K;        // branches of the slice
  int sources;  // forward 1, which all branches read; in the adjoint K, one for each branch, read in turn
  Int3 step;    // positions between lattice points
  Int3 rate[kLatticeBranches];   // in points; zero from K on, and on an axis where the kernel has one tap
  Int3 halo;                     // the largest rates
  Int3 reach[kLatticeBranches];  // halo of the points held for a branch: `halo`, or its rate if it has its own source
  Int3 origin_class, origin_point;  // class and point of the source under point 0 of target class 0
  Index3 source, target;            // sizes in positions, of the whole volumes
  Int3 points;                      // points of a source class (z: of the part); the last may lie outside the source
  Int3 target_points;               // points of a target class; the last may lie outside the target
  Int3 full_classes;                // target classes below this have all of target_points, the others one point less
  Int3 tiles;                       // tiles of a target class (z: of the part); the last may reach outside the target
  int first_plane, first_target_plane;     // where the part's planes begin in a class of the source and the target
  Classes source_classes, target_classes;  // the part's: what is packed, and where there are tiles
  int packed_points, packed_targets;       // points of all these classes, of one sample and chunk
  int taps_z;                              // 1 or 3
  int tile_z;                              // planes of a tile, 8 or 4
  int ring, ring_bytes;                    // slots for planes in shared memory, and their size
  int plane_points;                        // points from one slot to the next
  int free_planes[kLatticeBranches];  // by source: how many of the planes right under the tile tz = +1 does not read
  // By source: how many planes must have landed at each wait, counted from the first one held. The waits are those of
  // its branches at tz = -1, in the order of branch_in_turn, then those of tz = 0 and tz = +1. Never decreases.
  int planes_read[kLatticeBranches][kMaxWaits];
  // Inside a plane held for branch k, in points: a row's length; the point under tile point (0, 0), which the middle
  // tap reads; and where tap (ty, tx) lies relative to it. tap_points ascend, or stay equal.
  int pitch[kLatticeBranches], centre[kLatticeBranches], tap_points[kPlaneTaps][kLatticeBranches];
  Cover cover[kLatticeBranches];
  // For the descriptor of two taps. Lower half: points from tap 0 to the first; upper half: from the first to the
  // second.
  uint32_t tap_pairs[kTapPairs][kLatticeBranches];
};

// One tile.
struct Tile {
  int64_t n;                        // sample of the part
  Int3 target_class, target_first;  // the class, and the tile's first point in it
  Int3 target_left;                 // points that the class has from target_first on
  Int3 source_first;                // the block's first point, from the part's first plane on; may be negative
  int target_at, source_at;         // packed numbers of these two points; source_at may lie outside
  int source_volume;                // number of the source class among the packed ones
};

AUTOFOCUS_HD inline int64_t volume(const Int3& sizes) { return int64_t(sizes.z) * sizes.y * sizes.x; }
AUTOFOCUS_HD inline int64_t num_tiles(const Lattice& lattice) {
  return lattice.N * volume(lattice.tiles) * volume(lattice.target_classes.count);
}
// The number of class `c` among those packed, and the number of its point `p` among all packed points, which lie class
// by class. lattice_refusal ensures that both fit an int.
AUTOFOCUS_HD inline int class_number(const Classes& classes, const Int3& c) {
  const Int3 &first = classes.first, &count = classes.count;
  return ((c.z - first.z) * count.y + (c.y - first.y)) * count.x + (c.x - first.x);
}
AUTOFOCUS_HD inline int packed_number(const Classes& classes, const Int3& c, const Int3& points, const Int3& p) {
  return ((class_number(classes, c) * points.z + p.z) * points.y + p.y) * points.x + p.x;
}

// value / divisor by one multiplication with inverse_of(divisor). Exact while value * divisor < 2^16.
AUTOFOCUS_HD inline uint32_t inverse_of(int divisor) { return (1u << 16) / uint32_t(divisor) + 1; }
AUTOFOCUS_HD inline int divided(int value, uint32_t inverse) { return int(uint32_t(value) * inverse >> 16); }

// Planes of the block under a tile.
AUTOFOCUS_HD inline int planes(const Lattice& lattice) { return lattice.tile_z + 2 * lattice.halo.z; }
// Rows and columns of the planes held for a branch.
AUTOFOCUS_HD inline int rows(const Int3& reach) { return kTileY + 2 * reach.y; }
AUTOFOCUS_HD inline int columns(const Int3& reach) { return kTileX + 2 * reach.x; }
// Where the points held for branch k begin within the block.
AUTOFOCUS_HD inline int first_held(const Lattice& lattice, int k) { return lattice.halo.z - lattice.reach[k].z; }
AUTOFOCUS_HD inline int first_row(const Lattice& lattice, int k) { return lattice.halo.y - lattice.reach[k].y; }
AUTOFOCUS_HD inline int first_column(const Lattice& lattice, int k) { return lattice.halo.x - lattice.reach[k].x; }

// The planes held of a source, tile_z + 2 reach of them, are counted from the first one. They are read in ascending
// order: from phase tz on, no plane before first_read(tz) is read any more, so its slot is free once all threads are
// past the phase before.
AUTOFOCUS_HD inline int held_planes(const Lattice& lattice, int source) {
  return lattice.tile_z + 2 * lattice.reach[source].z;
}
AUTOFOCUS_HD inline int first_read(const Lattice& lattice, int source, int tz) {
  return tz < 0 ? 0 : lattice.reach[source].z + (tz > 0 ? lattice.free_planes[source] : 0);
}
// How many branches read one source, and which branch comes i-th. At tz = -1 they go backwards: rates usually ascend,
// and the largest reads the first planes, so it can begin before the others' planes have landed.
AUTOFOCUS_HD inline int readers(const Lattice& lattice) { return lattice.sources == 1 ? lattice.K : 1; }
AUTOFOCUS_HD inline int branch_in_turn(const Lattice& lattice, int tz, int i) { return tz < 0 ? lattice.K - 1 - i : i; }
// Planes that phase tz needs, all branches together.
AUTOFOCUS_HD inline int end_read(const Lattice& lattice, int source, int tz) {
  return lattice.planes_read[source][readers(lattice) + tz];
}

// Divides `number` in place and returns the remainder.
AUTOFOCUS_HD inline int take_remainder(uint32_t& number, int divisor) {
  const uint32_t quotient = number / uint32_t(divisor), remainder = number - quotient * uint32_t(divisor);
  number = quotient;
  return int(remainder);
}

// Tile `number` of 0 .. num_tiles. Classes vary fastest, because neighbouring classes read and write the same memory
// sectors; samples vary slowest.
AUTOFOCUS_HD inline Tile tile_at(const Lattice& lattice, int number) {
  uint32_t rest = uint32_t(number);
  Tile tile;
  Int3 source_class;
  const auto take_class = [&](int Int3::* axis) {
    const Classes& classes = lattice.target_classes;
    const int of_target = classes.first.*axis + take_remainder(rest, classes.count.*axis);
    tile.target_class.*axis = of_target;
    // Behind the last class of the source comes its first one, one point further on.
    const int of_source = lattice.origin_class.*axis + of_target, wraps = of_source >= lattice.step.*axis ? 1 : 0;
    source_class.*axis = of_source - wraps * lattice.step.*axis;
    tile.source_first.*axis = lattice.origin_point.*axis + wraps - lattice.halo.*axis;
    tile.target_left.*axis = lattice.target_points.*axis - (of_target < lattice.full_classes.*axis ? 0 : 1);
  };
  const auto take_first = [&](int Int3::* axis, int size) {
    const int first = tile.target_first.*axis = take_remainder(rest, lattice.tiles.*axis) * size;
    tile.source_first.*axis += first;
    tile.target_left.*axis -= first;
  };
  take_class(&Int3::x);
  take_class(&Int3::y);
  take_class(&Int3::z);
  take_first(&Int3::x, kTileX);
  take_first(&Int3::y, kTileY);
  take_first(&Int3::z, lattice.tile_z);
  tile.target_first.z += lattice.first_target_plane;
  tile.target_left.z -= lattice.first_target_plane;
  tile.source_first.z += lattice.first_target_plane - lattice.first_plane;
  tile.n = rest;
  tile.target_at = packed_number(lattice.target_classes, tile.target_class, lattice.target_points, tile.target_first);
  tile.source_at = packed_number(lattice.source_classes, source_class, lattice.points, tile.source_first);
  tile.source_volume = class_number(lattice.source_classes, source_class);
  return tile;
}

// The target position of point (z, y, x) of a tile. It lies outside the target where has_target is false.
AUTOFOCUS_HD inline Index3 target_position(const Lattice& lattice, const Tile& tile, int z, int y, int x) {
  return {int64_t(lattice.step.z) * (tile.target_first.z + z) + tile.target_class.z,
          int64_t(lattice.step.y) * (tile.target_first.y + y) + tile.target_class.y,
          int64_t(lattice.step.x) * (tile.target_first.x + x) + tile.target_class.x};
}

// Whether the target has this point, and its number among the packed points of the target.
AUTOFOCUS_HD inline bool has_target(const Tile& tile, int z, int y, int x) {
  return z < tile.target_left.z && y < tile.target_left.y && x < tile.target_left.x;
}
AUTOFOCUS_HD inline int packed_target(const Lattice& lattice, const Tile& tile, int z, int y, int x) {
  return tile.target_at + (z * lattice.target_points.y + y) * lattice.target_points.x + x;
}

// Whether the source lattice has points in this row or column of a block whose source_first is `first`. If not, taps
// read zeros there.
AUTOFOCUS_HD inline bool has_row(const Lattice& lattice, const Int3& first, int row) {
  return uint32_t(first.y + row) < uint32_t(lattice.points.y);
}
AUTOFOCUS_HD inline bool has_column(const Lattice& lattice, const Int3& first, int column) {
  return uint32_t(first.x + column) < uint32_t(lattice.points.x);
}

// The number of the block's point (plane, row, column) among the packed points of one sample and chunk.
AUTOFOCUS_HD inline int packed_index(const Lattice& lattice, const Tile& tile, int plane, int row, int column) {
  return tile.source_at + (plane * lattice.points.y + row) * lattice.points.x + column;
}

// For the packing kernel: the position that its thread `index` reads, and in `packed` the packed number where it goes.
// `points` are those of a class from `first_plane` on. Indices ascend with the position and not by class, so that
// neighbouring threads read neighbouring memory.
AUTOFOCUS_HD inline Index3 unpacked_position(const Int3& points, int first_plane, const Int3& step,
                                             const Classes& classes, int index, int& packed) {
  uint32_t rest = uint32_t(index);
  Int3 point, c;
  const auto take_axis = [&](int Int3::* axis) {
    uint32_t in_axis = uint32_t(take_remainder(rest, points.*axis * classes.count.*axis));
    c.*axis = classes.first.*axis + take_remainder(in_axis, classes.count.*axis);
    point.*axis = int(in_axis);
  };
  take_axis(&Int3::x);
  take_axis(&Int3::y);
  take_axis(&Int3::z);
  packed = packed_number(classes, c, points, point);
  return {int64_t(step.z) * (first_plane + point.z) + c.z, int64_t(step.y) * point.y + c.y,
          int64_t(step.x) * point.x + c.x};
}

// The plane, of those held for branch k, that tile plane z reads through tz.
AUTOFOCUS_HD inline int tap_plane(const Lattice& lattice, int z, int tz, int k) {
  return lattice.reach[k].z + z + tz * lattice.rate[k].z;
}
// Whether phase tz reads anything. A kernel with one tap in z reads at tz = 0 only.
AUTOFOCUS_HD inline bool reads(const Lattice& lattice, int tz) { return tz == 0 || lattice.taps_z > 1; }

// ------------------------------------------------------------------ host: from a problem to its lattices

// Which way a pass gathers: outputs from inputs (forward), or inputs from outputs (its adjoint). The adjoint is the
// same gather with the origin negated and the taps counted backwards.
enum class Direction { kForward, kAdjoint };

// Of one axis: the common factor of the dilations in positions, and the largest rate in points.
struct StepAndHalo {
  int step, halo;
};

inline StepAndHalo step_and_halo(const Problem& g, int64_t Index3::* axis) {
  if (g.kernel.*axis == 1) return {1, 0};
  const int64_t step = common_dilation(g, axis);
  int64_t largest = 0;
  for (int64_t k = 0; k < g.K; ++k) largest = g.dilation[k].*axis > largest ? g.dilation[k].*axis : largest;
  return {int(step), int(largest / step)};
}

inline Int3 common_step(const Problem& g) {
  return {step_and_halo(g, &Index3::z).step, step_and_halo(g, &Index3::y).step, step_and_halo(g, &Index3::x).step};
}

// Points of a class, the same for all classes: what lies outside the volume is packed as zeros.
inline Int3 lattice_points(const Index3& size, const Int3& step) {
  return {int(ceil_div(size.z, step.z)), int(ceil_div(size.y, step.y)), int(ceil_div(size.x, step.x))};
}

// Why the fast tier cannot take this problem on any GPU, or null.
inline const char* lattice_refusal(const Problem& g) {
  for (int64_t Index3::* axis : {&Index3::z, &Index3::y, &Index3::x})
    if (g.kernel.*axis != 1 && g.kernel.*axis != 3) return "the kernel has other than 1 or 3 taps on an axis";
  if (g.stride.z != 1 || g.stride.y != 1 || g.stride.x != 1) return "the stride is not 1";
  if (g.K > kLatticeBranches) return "there are more than 4 branches";
  constexpr int64_t kLimit = int64_t(1) << 28;  // positions and their sums fit an int
  for (int64_t Index3::* axis : {&Index3::z, &Index3::y, &Index3::x}) {
    if (g.input.*axis >= kLimit || g.output.*axis >= kLimit || g.origin.*axis >= kLimit || g.origin.*axis <= -kLimit)
      return "an axis or its padding is too long for 32-bit lattice indices";
    for (int64_t k = 0; k < g.K; ++k)
      if (g.dilation[k].*axis >= kLimit) return "a dilation is too large for 32-bit lattice indices";
    // Otherwise classes without a single point would be packed too, many times the source's memory.
    const int step = step_and_halo(g, axis).step;
    if (step > g.input.*axis || step > g.output.*axis)
      return "the dilations have a common factor larger than the volume";
  }
  for (const Index3& size : {g.input, g.output})
    if (volume(lattice_points(size, common_step(g))) * volume(common_step(g)) >= int64_t(1) << 31)
      return "the volume has too many points for 32-bit lattice indices";
  if (step_and_halo(g, &Index3::x).halo > kMaxHaloX)
    return "the dilations of the last axis reach further than 7 lattice points";
  if (kTileY + 2 * step_and_halo(g, &Index3::y).halo > kMaxRows)
    return "the dilations of the last axis but one reach further than 124 lattice points";
  return nullptr;
}

inline void choose_classes(Lattice& lattice, const Classes& source, const Classes& target) {
  lattice.source_classes = source;
  lattice.target_classes = target;
  lattice.packed_points = int(volume(source.count) * volume(lattice.points));
  lattice.packed_targets = int(volume(target.count) * volume(lattice.target_points));
}

// The lattice of a problem that lattice_refusal lets pass, for `branches` branches from `first_branch` on. The step is
// that of all branches of the problem, so lattices of different branches share packed operands. set_tile, set_ring and
// set_threads fill in the rest, in this order.
inline Lattice make_lattice(const Problem& g, Direction direction, int64_t first_branch, int64_t branches) {
  const bool forward = direction == Direction::kForward;
  Lattice lattice{};
  lattice.N = g.N;
  lattice.K = int(branches);
  lattice.sources = forward ? 1 : lattice.K;
  lattice.source = forward ? g.input : g.output;
  lattice.target = forward ? g.output : g.input;
  lattice.step = common_step(g);
  for (int k = 0; k < lattice.K; ++k) {
    const Index3& r = g.dilation[first_branch + k];
    Int3 &rate = lattice.rate[k], &halo = lattice.halo;
    rate = {g.kernel.z == 1 ? 0 : int(r.z / lattice.step.z), g.kernel.y == 1 ? 0 : int(r.y / lattice.step.y),
            g.kernel.x == 1 ? 0 : int(r.x / lattice.step.x)};
    halo = {rate.z > halo.z ? rate.z : halo.z, rate.y > halo.y ? rate.y : halo.y, rate.x > halo.x ? rate.x : halo.x};
  }
  lattice.plane_points = int(ceil_div(rows(lattice.halo) * columns(lattice.halo), kPlaneAligned)) * kPlaneAligned;
  for (int k = 0; k < lattice.K; ++k) {
    const Int3& rate = lattice.rate[k];
    const Int3 reach = lattice.reach[k] = forward ? lattice.halo : rate;
    const int pitch = lattice.pitch[k] = columns(reach);
    lattice.centre[k] = reach.y * pitch + reach.x;
    for (int tap = 0; tap < kPlaneTaps; ++tap) {
      // With one tap in y the three rows of taps coincide. The outer two keep to its ends, so that tap_points ascend.
      const int ty = tap / 3 - 1, tx = g.kernel.y == 1 && ty != 0 ? ty : tap % 3 - 1;
      lattice.tap_points[tap][k] = ty * rate.y * pitch + tx * rate.x;
    }
    for (int pair = 0; pair < kTapPairs; ++pair) {
      const int tap = 2 * pair, first = lattice.tap_points[tap][k];
      const int second = tap + 1 < kPlaneTaps ? lattice.tap_points[tap + 1][k] : first;
      lattice.tap_pairs[pair][k] = uint32_t(second - first) << 16 | uint32_t(first - lattice.tap_points[0][k]);
    }
  }
  lattice.taps_z = int(g.kernel.z);
  lattice.points = lattice_points(lattice.source, lattice.step);
  lattice.target_points = lattice_points(lattice.target, lattice.step);
  const auto choose_axis = [&](int Int3::* axis, int64_t Index3::* wide) {
    const int step = lattice.step.*axis;
    const InputLattice origin = input_lattice(forward ? g.origin.*wide : -(g.origin.*wide), 0, step);
    lattice.origin_class.*axis = int(origin.phase);
    lattice.origin_point.*axis = int(origin.point);
    lattice.full_classes.*axis = int(lattice.target.*wide) - (lattice.target_points.*axis - 1) * step;
  };
  choose_axis(&Int3::z, &Index3::z);
  choose_axis(&Int3::y, &Index3::y);
  choose_axis(&Int3::x, &Index3::x);
  const Classes all = {lattice.step, {0, 0, 0}};
  choose_classes(lattice, all, all);
  return lattice;
}

// The fewest passes, with rows spread evenly over them, and as many planes at once as threads reach: one if there are
// several passes, since each of them has more than half of the lines.
inline Cover cover_of(const Lattice& lattice, const Int3& reach, int threads) {
  const int lines = threads / columns(reach);
  const int passes = int(ceil_div(rows(reach), lines)), in_pass = int(ceil_div(rows(reach), passes));
  const int planes = lines / in_pass;
  return {columns(reach),
          in_pass,
          planes,
          passes,
          inverse_of(columns(reach)),
          inverse_of(in_pass),
          planes * lattice.points.y * lattice.points.x,
          planes * lattice.plane_points};
}

// `threads` of a block, at most 512: then Walk divides numbers small enough for divided().
inline void set_threads(Lattice& lattice, int threads) {
  for (int k = 0; k < lattice.K; ++k) lattice.cover[k] = cover_of(lattice, lattice.reach[k], threads);
}

// Sets tile_z and what follows from it: the tiles, and which planes each wait of a turn is for.
inline void set_tile(Lattice& lattice, int tile_z) {
  lattice.tile_z = tile_z;
  lattice.tiles = {int(ceil_div(lattice.target_points.z, tile_z)), int(ceil_div(lattice.target_points.y, kTileY)),
                   int(ceil_div(lattice.target_points.x, kTileX))};
  for (int source = 0; source < lattice.sources; ++source) {
    const int reach = lattice.reach[source].z;
    int& free = lattice.free_planes[source] = tile_z;
    int* const read = lattice.planes_read[source];
    int most = 0;
    for (int i = 0; i < readers(lattice); ++i) {
      const int k = lattice.sources == 1 ? branch_in_turn(lattice, -1, i) : source, rate = lattice.rate[k].z;
      if (rate < free) free = rate;
      if (reach - rate + tile_z > most) most = reach - rate + tile_z;
      read[i] = most;
    }
    // tz = 0 frees all planes before `reach`. Where even the smallest rate is above tile_z, no branch reads the last
    // ones of these; they must have landed all the same before their slots are written again.
    read[readers(lattice) - 1] = reach - free + tile_z;
    read[readers(lattice)] = reach + tile_z;
    read[readers(lattice) + 1] = held_planes(lattice, source);
  }
}

// The smallest possible ring: the planes that one phase reads.
inline int fewest_planes(const Lattice& lattice) {
  int fewest = lattice.tile_z;
  for (int source = 0; source < lattice.sources; ++source)
    if (end_read(lattice, source, -1) > fewest) fewest = end_read(lattice, source, -1);
  return fewest;
}
// Gives the ring `room` slots, but no more than the planes of two turns: nothing is written further ahead.
inline void set_ring(Lattice& lattice, int64_t room) {
  const int most = 2 * planes(lattice);
  lattice.ring = room < most ? int(room) : most;
  lattice.ring_bytes = lattice.ring * lattice.plane_points * kPointBytes;
}

}  // namespace autofocus::cuda
