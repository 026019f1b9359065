// Tiles of voxels, and for each tap the runs of a tile whose branches read inside the volume.
#pragma once

#include <algorithm>
#include <vector>

#include "lattice.h"

namespace autofocus {

// `count` neighbouring voxels of one row; they are rows `offset ...` of the tile's buffers.
struct Segment {
  int64_t z, y, x, count, offset;
};

// Cuts a volume into tiles of at most `voxels`: several rows each, or parts of a row where rows are long.
class TileGrid {
 public:
  TileGrid(const Index3& size, int64_t voxels) : size_(size) {
    if (volume(size) == 0) return;
    parts_ = (size.x + voxels - 1) / voxels;
    rows_ = std::max<int64_t>(1, voxels / size.x);
    const int64_t rows = size.z * size.y;
    tiles_ = parts_ * ((rows + rows_ - 1) / rows_);
  }

  int64_t count() const { return tiles_; }

  // Fills `segments` and returns the number of voxels.
  int64_t at(int64_t tile, std::vector<Segment>& segments) const {
    segments.clear();
    const int64_t part = tile % parts_;
    const int64_t begin = size_.x * part / parts_, end = size_.x * (part + 1) / parts_;
    const int64_t first = tile / parts_ * rows_;
    const int64_t last = std::min(first + rows_, size_.z * size_.y);
    int64_t offset = 0;
    for (int64_t row = first; row < last; ++row, offset += end - begin)
      segments.push_back({row / size_.y, row % size_.y, begin, end - begin, offset});
    return offset;
  }

 private:
  Index3 size_;
  int64_t parts_ = 1, rows_ = 1, tiles_ = 0;
};

// A run of a segment in which the same branches read inside the volume.
struct Run {
  int64_t begin, count;  // relative to the segment
  int active;
  int branch[kMaxBranches];
};

// For one tap of one segment: first input voxel of every branch's row (as if the whole segment were inside), and runs.
struct TapRuns {
  int64_t voxel[kMaxBranches];  // linear input position under the segment's first voxel; may lie outside the row
  std::vector<Run> runs;
  bool any;
};

inline void find_runs(const Problem& g, const Segment& segment, const Index3& offset, TapRuns& result) {
  int64_t low[kMaxBranches], high[kMaxBranches], cuts[2 * kMaxBranches + 2];
  int cut_count = 0;
  result.runs.clear();
  result.any = false;
  cuts[cut_count++] = 0;
  cuts[cut_count++] = segment.count;
  for (int64_t k = 0; k < g.K; ++k) {
    const Index3 q = input_position(g, {segment.z, segment.y, segment.x}, k, offset);
    low[k] = high[k] = 0;
    result.voxel[k] = ravel(q, g.input);
    if (q.z < 0 || q.z >= g.input.z || q.y < 0 || q.y >= g.input.y) continue;
    low[k] = std::min(segment.count, std::max<int64_t>(0, ceil_div(-q.x, g.stride.x)));
    high[k] = std::min(segment.count, std::max<int64_t>(0, ceil_div(g.input.x - q.x, g.stride.x)));
    if (low[k] >= high[k]) continue;
    cuts[cut_count++] = low[k];
    cuts[cut_count++] = high[k];
    result.any = true;
  }
  std::sort(cuts, cuts + cut_count);
  for (int i = 0; i + 1 < cut_count; ++i) {
    if (cuts[i] == cuts[i + 1]) continue;
    Run run;
    run.begin = cuts[i];
    run.count = cuts[i + 1] - cuts[i];
    run.active = 0;
    for (int64_t k = 0; k < g.K; ++k)
      if (low[k] <= cuts[i] && cuts[i + 1] <= high[k]) run.branch[run.active++] = int(k);
    result.runs.push_back(run);
  }
}

// Whether any branch of a whole row of taps (fixed z and y) can read inside the volume from any segment.
inline bool row_of_taps_inside(const Problem& g, const std::vector<Segment>& segments, const Index3& offset) {
  for (const Segment& s : segments)
    for (int64_t k = 0; k < g.K; ++k) {
      const Index3 q = input_position(g, {s.z, s.y, s.x}, k, offset);
      if (q.z >= 0 && q.z < g.input.z && q.y >= 0 && q.y < g.input.y) return true;
    }
  return false;
}

}  // namespace autofocus
