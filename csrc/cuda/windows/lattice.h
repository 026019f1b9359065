// The gather on sub-lattices: which points a tile loads and where each tap lands in it (docs/cuda.md).
//
// With stride 1 and all dilations of an axis multiples of `step`, target positions of one class modulo `step` read
// source positions of one class only. Such a class is a lattice on which the dilations are small: rate_k = dilation_k /
// step. A tile is tile_z x 8 x 8 target points of one class; the block of source points it reads is larger by `halo`,
// the largest rate, on every side. A kernel with one tap on an axis is treated as three taps at rate zero, those beside
// the middle with weights of zero: they read points that the others read too, in an order in which no tap lies before
// the last. Everything here is plain integer arithmetic, tested point by point on the host.
#pragma once

#include "../../geometry.h"

namespace autofocus::cuda {

constexpr int kLatticeBranches = 4;  // a thread holds the attention of every branch in registers
constexpr int kTileY = 8;
constexpr int kTileX = 8;  // eight points of 16 bytes side by side fill the 32 banks of shared memory once
constexpr int kMaxHaloX = 7;
constexpr int kMaxRows = 256;                    // of a block: a bulk copy takes no more
constexpr int kPointBytes = 16;                  // of a packed point: a chunk of channels
constexpr int kPlaneAligned = 8;                 // points: a bulk copy writes at multiples of 128 bytes
constexpr int kPlaneTaps = 9;                    // taps (ty, tx) of one tz, in this order
constexpr int kTapPairs = 5;                     // of a product; the last tap has no second one
constexpr int kMaxWaits = kLatticeBranches + 2;  // for each branch at tz = -1, at tz = 0 and at tz = +1

struct Int3 {
  int z, y, x;
};

// Classes of a volume that are worked on: on each axis all of them, or one.
struct Classes {
  Int3 count, first;
};

// How a block of threads goes through the points that a branch reads: a pass is some rows of every plane, in which each
// thread has one point of every `planes`th plane.
struct Cover {
  int columns, rows, planes, passes;
  uint32_t by_columns, by_rows;  // for divided()
  int source_step, shared_step;  // from a thread's point to its next, in packed points and in shared memory
};

struct Lattice {
  int64_t N;
  int K;
  int sources;  // one that all branches read, or in the adjoint one for each, in turn
  Int3 step;
  Int3 rate[kLatticeBranches];  // zero from K on, and on an axis on which the kernel has one tap
  Int3 halo;
  Int3 reach[kLatticeBranches];     // of the points held for a branch: `halo`, or its own rate if it has its own source
  Int3 origin_class, origin_point;  // of the source, under point 0 of target class 0
  Index3 source, target;            // sizes
  Int3 points;                      // lattice points of a source class per axis; the last may lie outside the source
  Int3 target_points;               // and of a target class
  Int3 full_classes;                // of the target; those behind them have a point less
  Int3 tiles;                       // tiles of a target class per axis; the last ones may lie outside the target
  int first_plane, first_target_plane;     // of all; what is packed and where there are tiles may begin further on
  Classes source_classes, target_classes;  // what is packed, and where there are tiles
  int packed_points, packed_targets;       // points of these classes, each in full
  int taps_z;
  int tile_z;
  int ring, ring_bytes;               // planes of points held in shared memory
  int plane_points;                   // from one plane to the next
  int free_planes[kLatticeBranches];  // of a source, under the tile's first ones, that tz = +1 does not read
  // Of a source: how many planes have to be there at each wait. Branches come in the order of branch_in_turn; where one
  // reads less than those before it, what they read.
  int planes_read[kLatticeBranches][kMaxWaits];
  // In a plane, of the points held for branch k: how many a row has; the point under point (0, 0) of a tile through tap
  // (0, 0), and where tap (ty, tx) lies from there, ascending.
  int pitch[kLatticeBranches], centre[kLatticeBranches], tap_points[kPlaneTaps][kLatticeBranches];
  Cover cover[kLatticeBranches];
  // Of a pair of taps: where the first one lies, counted from tap 0, and in the upper half how far on the second one
  // does.
  uint32_t tap_pairs[kTapPairs][kLatticeBranches];
};

// One tile: its target class and first target point, of which the target has `target_left` more on each axis, and the
// source point at plane 0, row 0, column 0; what number these two points have among the packed ones.
struct Tile {
  int64_t n;
  Int3 target_class, target_first, target_left, source_first;
  int target_at, source_at;
  int source_volume;  // the number of the source class among those packed
};

AUTOFOCUS_HD inline int64_t volume(const Int3& sizes) { return int64_t(sizes.z) * sizes.y * sizes.x; }
AUTOFOCUS_HD inline int64_t num_tiles(const Lattice& lattice) {
  return lattice.N * volume(lattice.tiles) * volume(lattice.target_classes.count);
}
// The number of class `c` among those packed, and of its point `p`, classes outermost. lattice_refusal sees to it that
// it fits.
AUTOFOCUS_HD inline int class_number(const Classes& classes, const Int3& c) {
  const Int3 &first = classes.first, &count = classes.count;
  return ((c.z - first.z) * count.y + (c.y - first.y)) * count.x + (c.x - first.x);
}
AUTOFOCUS_HD inline int packed_number(const Classes& classes, const Int3& c, const Int3& points, const Int3& p) {
  return ((class_number(classes, c) * points.z + p.z) * points.y + p.y) * points.x + p.x;
}

// value / divisor for an inverse of the divisor, as long as their product is below 2^16.
AUTOFOCUS_HD inline uint32_t inverse_of(int divisor) { return (1u << 16) / uint32_t(divisor) + 1; }
AUTOFOCUS_HD inline int divided(int value, uint32_t inverse) { return int(uint32_t(value) * inverse >> 16); }

// The block of source points under a tile.
AUTOFOCUS_HD inline int planes(const Lattice& lattice) { return lattice.tile_z + 2 * lattice.halo.z; }
// What is held of it for a branch.
AUTOFOCUS_HD inline int rows(const Int3& reach) { return kTileY + 2 * reach.y; }
AUTOFOCUS_HD inline int columns(const Int3& reach) { return kTileX + 2 * reach.x; }
// Its first point, counted from the first of the block.
AUTOFOCUS_HD inline int first_held(const Lattice& lattice, int k) { return lattice.halo.z - lattice.reach[k].z; }
AUTOFOCUS_HD inline int first_row(const Lattice& lattice, int k) { return lattice.halo.y - lattice.reach[k].y; }
AUTOFOCUS_HD inline int first_column(const Lattice& lattice, int k) { return lattice.halo.x - lattice.reach[k].x; }

// Planes of a source are counted from the first that is held for a branch, 0 .. tile_z + 2 reach, and are read in this
// order: tz = -1 begins with the first, and none of those in front of first_read is read from tz on.
AUTOFOCUS_HD inline int held_planes(const Lattice& lattice, int source) {
  return lattice.tile_z + 2 * lattice.reach[source].z;
}
AUTOFOCUS_HD inline int first_read(const Lattice& lattice, int source, int tz) {
  return tz < 0 ? 0 : lattice.reach[source].z + (tz > 0 ? lattice.free_planes[source] : 0);
}
// Branches that read a source one after the other: at tz = -1 that of the largest rate, which reads the first planes,
// before the others, if rates ascend as they usually do.
AUTOFOCUS_HD inline int readers(const Lattice& lattice) { return lattice.sources == 1 ? lattice.K : 1; }
AUTOFOCUS_HD inline int branch_in_turn(const Lattice& lattice, int tz, int i) { return tz < 0 ? lattice.K - 1 - i : i; }
// What tz needs altogether.
AUTOFOCUS_HD inline int end_read(const Lattice& lattice, int source, int tz) {
  return lattice.planes_read[source][readers(lattice) + tz];
}

// Division: the number becomes the quotient, the remainder is returned.
AUTOFOCUS_HD inline int take_remainder(uint32_t& number, int divisor) {
  const uint32_t quotient = number / uint32_t(divisor), remainder = number - quotient * uint32_t(divisor);
  number = quotient;
  return int(remainder);
}

// Tile number `number`. Classes vary fastest: neighbouring classes read and write the same memory sectors.
AUTOFOCUS_HD inline Tile tile_at(const Lattice& lattice, int number) {
  uint32_t rest = uint32_t(number);
  Tile tile;
  Int3 source_class;
  const auto take_class = [&](int Int3::* axis) {
    const Classes& classes = lattice.target_classes;
    const int of_target = classes.first.*axis + take_remainder(rest, classes.count.*axis);
    tile.target_class.*axis = of_target;
    // The source's classes begin again, a point further on.
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

// Target position of point (z, y, x) of a tile; outside the target for the surplus points of border tiles.
AUTOFOCUS_HD inline Index3 target_position(const Lattice& lattice, const Tile& tile, int z, int y, int x) {
  return {int64_t(lattice.step.z) * (tile.target_first.z + z) + tile.target_class.z,
          int64_t(lattice.step.y) * (tile.target_first.y + y) + tile.target_class.y,
          int64_t(lattice.step.x) * (tile.target_first.x + x) + tile.target_class.x};
}

// Whether the target has it, and its number among the packed points of the target.
AUTOFOCUS_HD inline bool has_target(const Tile& tile, int z, int y, int x) {
  return z < tile.target_left.z && y < tile.target_left.y && x < tile.target_left.x;
}
AUTOFOCUS_HD inline int packed_target(const Lattice& lattice, const Tile& tile, int z, int y, int x) {
  return tile.target_at + (z * lattice.target_points.y + y) * lattice.target_points.x + x;
}

// Whether the source lattice has points in a row or column of a block with this source_first; if not, zeros are read
// there.
AUTOFOCUS_HD inline bool has_row(const Lattice& lattice, const Int3& first, int row) {
  return uint32_t(first.y + row) < uint32_t(lattice.points.y);
}
AUTOFOCUS_HD inline bool has_column(const Lattice& lattice, const Int3& first, int column) {
  return uint32_t(first.x + column) < uint32_t(lattice.points.x);
}

// The number of the point at (plane, row, column) among the packed points of one sample and channel chunk.
AUTOFOCUS_HD inline int packed_index(const Lattice& lattice, const Tile& tile, int plane, int row, int column) {
  return tile.source_at + (plane * lattice.points.y + row) * lattice.points.x + column;
}

// Source position of packed point number `index` of those from `first_plane` on, counted with the position fastest and
// the class per axis inside it, so that neighbouring threads of the packing kernel read neighbouring memory. `packed`
// is where it goes.
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

// The plane read by tile plane z through tap tz of branch k.
AUTOFOCUS_HD inline int tap_plane(const Lattice& lattice, int z, int tz, int k) {
  return lattice.reach[k].z + z + tz * lattice.rate[k].z;
}
// Whether phase tz reads anything: a kernel with one tap in z has tz = 0 only.
AUTOFOCUS_HD inline bool reads(const Lattice& lattice, int tz) { return tz == 0 || lattice.taps_z > 1; }

// ------------------------------------------------------------------ host: from a problem to its lattices

// Which way the gather goes: outputs from inputs (forward), or inputs from outputs (its adjoint). The adjoint is the
// same gather with the origin negated and the taps counted backwards.
enum class Direction { kForward, kAdjoint };

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

inline Int3 lattice_points(const Index3& size, const Int3& step) {
  return {int(ceil_div(size.z, step.z)), int(ceil_div(size.y, step.y)), int(ceil_div(size.x, step.x))};
}

// Why a problem has no lattice form, or null.
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
    // Classes without a single point would make the packed source far larger than the source.
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

// The lattices of a problem that lattice_refusal lets pass; tile_z and what follows from it are set by set_tile. The
// step is the branches' common one; the gather is that of `branches` of them from `first_branch` on.
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

inline Cover cover_of(const Lattice& lattice, const Int3& reach, int threads) {
  const int lines = threads / columns(reach);
  const int passes = int(ceil_div(rows(reach), lines)), in_pass = int(ceil_div(rows(reach), passes));
  const int planes = passes == 1 ? lines / in_pass : 1;
  return {columns(reach),
          in_pass,
          planes,
          passes,
          inverse_of(columns(reach)),
          inverse_of(in_pass),
          planes * lattice.points.y * lattice.points.x,
          planes * lattice.plane_points};
}

// The threads of a block, at most 512: then what is divided, and by what, is small enough.
inline void set_threads(Lattice& lattice, int threads) {
  for (int k = 0; k < lattice.K; ++k) lattice.cover[k] = cover_of(lattice, lattice.reach[k], threads);
}

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
    // Every plane is waited for before its slot is written again, also one that no branch reads.
    read[readers(lattice) - 1] = reach - free + tile_z;
    read[readers(lattice)] = reach + tile_z;
    read[readers(lattice) + 1] = held_planes(lattice, source);
  }
}

// The fewest planes that the ring can be of: what a tz reads.
inline int fewest_planes(const Lattice& lattice) {
  int fewest = lattice.tile_z;
  for (int source = 0; source < lattice.sources; ++source)
    if (end_read(lattice, source, -1) > fewest) fewest = end_read(lattice, source, -1);
  return fewest;
}
// As many as there is room for, but not more than this turn and the next one read.
inline void set_ring(Lattice& lattice, int64_t room) {
  const int most = 2 * planes(lattice);
  lattice.ring = room < most ? int(room) : most;
  lattice.ring_bytes = lattice.ring * lattice.plane_points * kPointBytes;
}

}  // namespace autofocus::cuda
