// Tensors as the kernels see them: a pointer and strides in elements.
#pragma once

#include "../geometry.h"

namespace autofocus {

// A row of voxels: neighbours are `x` apart, the channels of a voxel `c`.
template <typename T>
struct Row {
  T* data;
  int64_t x, c;
};

// A tensor [N, C, D, H, W] (of the weight: [O, C, *kernel]).
template <typename T>
struct View {
  T* data;
  int64_t n, c;
  Index3 s;

  // From position p and channel `channel` on, neighbours `step` positions apart.
  Row<T> row(int64_t sample, int64_t channel, const Index3& p, int64_t step = 1) const {
    return {data + sample * n + channel * c + p.z * s.z + p.y * s.y + p.x * s.x, step * s.x, c};
  }
};

}  // namespace autofocus
