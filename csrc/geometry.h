// The integers of one problem and the index arithmetic of the op, shared by the CPU and CUDA kernels.
//
// No torch types and no state: everything here compiles for the host and for the device, so the arithmetic tested on a
// CPU is the arithmetic a GPU runs. Axes are always z, y, x; problems with fewer spatial axes arrive with leading axes
// of size one. Meaning of every symbol: docs/math.md, section 1.
#pragma once

#include <cstdint>
#include <numeric>

#if defined(__CUDACC__)
#define AUTOFOCUS_HD __host__ __device__
#else
#define AUTOFOCUS_HD
#endif

namespace autofocus {

// Upper limit of K, so that a Problem is a plain value that can be passed to a kernel; the bindings refuse more.
constexpr int64_t kMaxBranches = 32;

// A position, a size or an offset: one integer per axis.
struct Index3 {
  int64_t z, y, x;
};

AUTOFOCUS_HD inline int64_t volume(const Index3& size) { return size.z * size.y * size.x; }

// Position `linear` of a volume in z, y, x order (x fastest).
AUTOFOCUS_HD inline Index3 unravel(int64_t linear, const Index3& size) {
  const int64_t x = linear % size.x;
  const int64_t rows = linear / size.x;
  return {rows / size.y, rows % size.y, x};
}

AUTOFOCUS_HD inline int64_t ravel(const Index3& p, const Index3& size) { return (p.z * size.y + p.y) * size.x + p.x; }

AUTOFOCUS_HD inline bool inside(const Index3& p, const Index3& size) {
  return p.z >= 0 && p.z < size.z && p.y >= 0 && p.y < size.y && p.x >= 0 && p.x < size.x;
}

// Quotients of integers of any sign by a positive one, rounded down and up.
AUTOFOCUS_HD inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
AUTOFOCUS_HD inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

struct Problem {
  int64_t N, C, O, K;
  Index3 kernel;                  // odd on every axis
  Index3 dilation[kMaxBranches];  // K of them are set, each at least 1
  Index3 stride;                  // at least 1
  Index3 origin;                  // input position under output 0 (may be negative: padding, or positive: cropping)
  Index3 input;                   // input size
  Index3 output;                  // output size
};

AUTOFOCUS_HD inline int64_t num_taps(const Problem& g) { return volume(g.kernel); }

// Tap t in -(kernel-1)/2 .. (kernel-1)/2 per axis; `tap` counts 0 .. T-1 in the order of the weight's own axes.
AUTOFOCUS_HD inline Index3 tap_offset(const Problem& g, int64_t tap) {
  const Index3 j = unravel(tap, g.kernel);
  return {j.z - g.kernel.z / 2, j.y - g.kernel.y / 2, j.x - g.kernel.x / 2};
}

// Input position read by output position p through `offset` (= tap_offset) in branch k; may lie outside the input.
AUTOFOCUS_HD inline Index3 input_position(const Problem& g, const Index3& p, int64_t k, const Index3& offset) {
  const Index3& r = g.dilation[k];
  return {g.origin.z + g.stride.z * p.z + r.z * offset.z, g.origin.y + g.stride.y * p.y + r.y * offset.y,
          g.origin.x + g.stride.x * p.x + r.x * offset.x};
}

// The inverse, for gathers over the input: the one output position that reads input position q through `offset` in
// branch k. False when there is none: it falls between strides or outside the output.
AUTOFOCUS_HD inline bool output_position(const Problem& g, const Index3& q, int64_t k, const Index3& offset,
                                         Index3& p) {
  const Index3& r = g.dilation[k];
  const int64_t z = q.z - g.origin.z - r.z * offset.z;
  const int64_t y = q.y - g.origin.y - r.y * offset.y;
  const int64_t x = q.x - g.origin.x - r.x * offset.x;
  // The remainder of a negative number may be negative but is zero only for multiples, which is all that is asked.
  if (z % g.stride.z != 0 || y % g.stride.y != 0 || x % g.stride.x != 0) return false;
  p = {z / g.stride.z, y / g.stride.y, x / g.stride.x};
  return inside(p, g.output);
}

// Lattices (docs/math.md, section 5), axis by axis. With stride 1 and every dilation a multiple of `step`, outputs
// phase + step p' read inputs phase' + step q' only, and output point p' = 0 lies over input point q' = point.
struct InputLattice {
  int64_t phase, point;
};

AUTOFOCUS_HD inline InputLattice input_lattice(int64_t origin, int64_t output_phase, int64_t step) {
  const int64_t position = origin + output_phase;
  const int64_t point = floor_div(position, step);
  return {position - step * point, point};
}

// The largest step that all dilations of an axis are multiples of.
inline int64_t common_dilation(const Problem& g, int64_t Index3::* axis) {
  int64_t common = 0;
  for (int64_t k = 0; k < g.K; ++k) common = std::gcd(common, g.dilation[k].*axis);
  return common;
}

}  // namespace autofocus
