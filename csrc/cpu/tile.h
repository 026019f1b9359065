// Tiles of voxels, and for each tap the runs of a tile whose branches read inside the volume.
#pragma once

#include <algorithm>
#include <vector>

#include "../geometry.h"

namespace autofocus {

// `count` neighbouring voxels of one row; they are rows `offset ...` of the tile's buffers. Segments of one `part`
// cover the same x.
struct Segment {
  int64_t z, y, x, count, offset, part;

  Index3 first() const { return {z, y, x}; }
};

// Cuts a volume into tiles of at most `voxels`: several rows each, or parts of a row where rows are long.
class TileGrid {
 public:
  TileGrid(const Index3& size, int64_t voxels) : size_(size) {
    if (volume(size) == 0) return;
    parts_ = ceil_div(size.x, voxels);
    rows_ = std::max<int64_t>(1, voxels / size.x);
    tiles_ = parts_ * ceil_div(size.z * size.y, rows_);
  }

  int64_t count() const { return tiles_; }
  int64_t parts() const { return parts_; }
  int64_t begin(int64_t part) const { return size_.x * part / parts_; }

  // Fills `segments` and returns the number of voxels.
  int64_t at(int64_t tile, std::vector<Segment>& segments) const {
    segments.clear();
    const int64_t part = tile % parts_;
    const int64_t x = begin(part), count = begin(part + 1) - x;
    const int64_t first = tile / parts_ * rows_;
    const int64_t last = std::min(first + rows_, size_.z * size_.y);
    int64_t offset = 0;
    for (int64_t row = first; row < last; ++row, offset += count)
      segments.push_back({row / size_.y, row % size_.y, x, count, offset, part});
    return offset;
  }

 private:
  Index3 size_;
  int64_t parts_ = 1, rows_ = 1, tiles_ = 0;
};

// A set of branches, one bit each.
using BranchSet = uint64_t;
static_assert(kMaxBranches <= 64, "a BranchSet holds one bit a branch");

// A run of a segment in which the same branches read inside the volume along x.
struct Run {
  int64_t begin, count;  // relative to the segment
  BranchSet branches;
};

// The runs of every part of a row and every tap of the x axis: they do not depend on z and y.
class RunTable {
 public:
  RunTable(const Problem& g, const TileGrid& grid) : taps_(g.kernel.x), runs_(grid.parts() * g.kernel.x) {
    for (int64_t part = 0; part < grid.parts(); ++part)
      for (int64_t tap = 0; tap < taps_; ++tap)
        runs_[part * taps_ + tap] =
            find(g, grid.begin(part), grid.begin(part + 1) - grid.begin(part), tap - g.kernel.x / 2);
  }

  const std::vector<Run>& at(int64_t part, int64_t tap) const { return runs_[part * taps_ + tap]; }

 private:
  static std::vector<Run> find(const Problem& g, int64_t x, int64_t count, int64_t offset) {
    int64_t low[kMaxBranches], high[kMaxBranches];
    std::vector<int64_t> cuts = {0, count};
    for (int64_t k = 0; k < g.K; ++k) {
      const int64_t q = g.origin.x + g.stride.x * x + g.dilation[k].x * offset;
      low[k] = std::clamp<int64_t>(ceil_div(-q, g.stride.x), 0, count);
      high[k] = std::clamp<int64_t>(ceil_div(g.input.x - q, g.stride.x), 0, count);
      cuts.push_back(low[k]);
      cuts.push_back(high[k]);
    }
    std::sort(cuts.begin(), cuts.end());
    std::vector<Run> runs;
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      if (cuts[i] == cuts[i + 1]) continue;
      Run run{cuts[i], cuts[i + 1] - cuts[i], 0};
      for (int64_t k = 0; k < g.K; ++k)
        if (low[k] <= cuts[i] && cuts[i + 1] <= high[k]) run.branches |= BranchSet(1) << k;
      runs.push_back(run);
    }
    return runs;
  }

  int64_t taps_;
  std::vector<std::vector<Run>> runs_;
};

// One segment seen through one row of taps (fixed z and y of the kernel).
struct TapRow {
  BranchSet inside;          // branches whose input row exists
  int64_t at[kMaxBranches];  // where the input has the voxel under the segment's first and the centre tap of the row
};

// `strides` are those of the input's voxels.
inline TapRow find_tap_row(const Problem& g, const Segment& segment, const Index3& offset, const Index3& strides) {
  TapRow row;
  row.inside = 0;
  for (int64_t k = 0; k < g.K; ++k) {
    const Index3 q = input_position(g, segment.first(), k, {offset.z, offset.y, 0});
    row.at[k] = q.z * strides.z + q.y * strides.y + q.x * strides.x;
    if (q.z >= 0 && q.z < g.input.z && q.y >= 0 && q.y < g.input.y) row.inside |= BranchSet(1) << k;
  }
  return row;
}

// Fills one TapRow a segment; false if no branch reads inside the volume from any of them.
inline bool find_tap_rows(const Problem& g, const std::vector<Segment>& segments, const Index3& offset,
                          const Index3& strides, std::vector<TapRow>& rows) {
  rows.clear();
  BranchSet any = 0;
  for (const Segment& segment : segments) {
    rows.push_back(find_tap_row(g, segment, offset, strides));
    any |= rows.back().inside;
  }
  return any != 0;
}

// Calls visit(i, k) for the branches k of a set, in order; returns how many there are.
template <typename Visit>
inline int for_each_branch(BranchSet branches, const Visit& visit) {
  int count = 0;
  for (; branches != 0; branches &= branches - 1) visit(count++, __builtin_ctzll(branches));
  return count;
}

}  // namespace autofocus
