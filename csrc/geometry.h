// The integers of one problem and its index arithmetic, shared by the CPU and the CUDA kernels.
//
// There are no torch types and no state here, and all of it compiles for host and device: the arithmetic tested on a
// CPU is the arithmetic a GPU runs. Axes are always z, y, x; problems with fewer spatial axes arrive with leading axes
// of size one. docs/math.md, section 1, explains every symbol.
#pragma once

#include <cstdint>
#include <numeric>

#if defined(__CUDACC__)
#define AUTOFOCUS_HD __host__ __device__
#else
#define AUTOFOCUS_HD
#endif

namespace autofocus {

// The most branches. A fixed array keeps Problem a plain value that a kernel can take as a parameter. The bindings
// refuse more.
constexpr int64_t kMaxBranches = 32;

// A position, a size or an offset, in voxels.
struct Index3 {
  int64_t z, y, x;
};

AUTOFOCUS_HD inline int64_t volume(const Index3& size) { return size.z * size.y * size.x; }

// The position numbered `linear` in a volume of this size, x fastest; ravel is the inverse.
AUTOFOCUS_HD inline Index3 unravel(int64_t linear, const Index3& size) {
  const int64_t x = linear % size.x;
  const int64_t rows = linear / size.x;
  return {rows / size.y, rows % size.y, x};
}

AUTOFOCUS_HD inline int64_t ravel(const Index3& p, const Index3& size) { return (p.z * size.y + p.y) * size.x + p.x; }

AUTOFOCUS_HD inline bool inside(const Index3& p, const Index3& size) {
  return p.z >= 0 && p.z < size.z && p.y >= 0 && p.y < size.y && p.x >= 0 && p.x < size.x;
}

// a / b rounded down and up, for a of any sign and positive b.
AUTOFOCUS_HD inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
AUTOFOCUS_HD inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// All integers that describe a call, written `g`.
struct Problem {
  int64_t N, C, O, K;
  Index3 kernel;                  // odd on every axis
  Index3 dilation[kMaxBranches];  // the first K are set, each at least 1
  Index3 stride;                  // at least 1
  Index3 origin;                  // input position under output 0, of any sign: padding and cropping are in here
  Index3 input;                   // size
  Index3 output;                  // size
};

AUTOFOCUS_HD inline int64_t num_taps(const Problem& g) { return volume(g.kernel); }

// Tap number `tap`, 0 .. T-1 in the order of the weight's axes, as an offset t in -(kernel-1)/2 .. (kernel-1)/2 per
// axis.
AUTOFOCUS_HD inline Index3 tap_offset(const Problem& g, int64_t tap) {
  const Index3 j = unravel(tap, g.kernel);
  return {j.z - g.kernel.z / 2, j.y - g.kernel.y / 2, j.x - g.kernel.x / 2};
}

// The input position that output position p reads in branch k through the tap `offset` (from tap_offset). It may lie
// outside the input.
AUTOFOCUS_HD inline Index3 input_position(const Problem& g, const Index3& p, int64_t k, const Index3& offset) {
  const Index3& r = g.dilation[k];
  return {g.origin.z + g.stride.z * p.z + r.z * offset.z, g.origin.y + g.stride.y * p.y + r.y * offset.y,
          g.origin.x + g.stride.x * p.x + r.x * offset.x};
}

// The inverse of input_position, for passes that gather at an input position: the only output position p that reads q
// in branch k through `offset`. False if there is none, because it would fall between strides or outside the output.
AUTOFOCUS_HD inline bool output_position(const Problem& g, const Index3& q, int64_t k, const Index3& offset,
                                         Index3& p) {
  const Index3& r = g.dilation[k];
  const int64_t z = q.z - g.origin.z - r.z * offset.z;
  const int64_t y = q.y - g.origin.y - r.y * offset.y;
  const int64_t x = q.x - g.origin.x - r.x * offset.x;
  // A negative number may have a negative remainder, but only multiples have remainder zero.
  if (z % g.stride.z != 0 || y % g.stride.y != 0 || x % g.stride.x != 0) return false;
  p = {z / g.stride.z, y / g.stride.y, x / g.stride.x};
  return inside(p, g.output);
}

// One axis of a lattice (docs/math.md, section 5). With stride 1 and every dilation a multiple of `step`, outputs
// output_phase + step p' read only inputs phase + step q', and output point p' = 0 lies over input point q' = point.
struct InputLattice {
  int64_t phase, point;
};

AUTOFOCUS_HD inline InputLattice input_lattice(int64_t origin, int64_t output_phase, int64_t step) {
  const int64_t position = origin + output_phase;
  const int64_t point = floor_div(position, step);
  return {position - step * point, point};
}

// The greatest common divisor of all dilations of an axis.
inline int64_t common_dilation(const Problem& g, int64_t Index3::* axis) {
  int64_t common = 0;
  for (int64_t k = 0; k < g.K; ++k) common = std::gcd(common, g.dilation[k].*axis);
  return common;
}

}  // namespace autofocus
