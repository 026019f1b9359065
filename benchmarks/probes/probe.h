// What the probes share. A probe is a program of its own: it asks the GPU one thing that the kernels of
// csrc/cuda/windows take for granted, through the very functions they call, and prints PASS or FAIL and numbers. Its
// status is the number of failures.
//
// Values are small integers, so that sums of products are exact in float and right means equal.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#include "../../csrc/cuda/windows/product.h"

namespace probe {

using namespace autofocus::cuda;

constexpr int kPitch = 22;  // points of a row, as in lattice.h
constexpr int kReach = 7;   // in rows and columns
constexpr int kReachZ = 3;  // in planes: as many as every GPU has room for
constexpr int kRows = 8 + 2 * kReach;
constexpr int kPlanePoints = kRows * kPitch;
constexpr int kPoints = (1 + 2 * kReachZ) * kPlanePoints;
constexpr int kGroups = 4;  // warpgroups of a block
template <typename T>
constexpr int kChannels = 16 / int(sizeof(T));  // of a point
#if defined(__CUDACC__)
constexpr int kRepeat = 1000;  // products to be timed
#else
constexpr int kRepeat = 1;  // the tests run the probes over an emulation, which has no time
#endif

inline int failures = 0;

inline void report(bool good, const char* what, const char* numbers) {
  failures += !good;
  std::printf("%s %s: %s\n", good ? "PASS" : "FAIL", what, numbers);
  std::fflush(stdout);
}

inline int small_integer(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return int(state >> 16) % 9 - 4;
}

// The small integer as an element.
inline uint32_t bits(int value, float) {
  const float element = float(value);
  uint32_t word;
  std::memcpy(&word, &element, sizeof(word));
  return word;
}
inline uint16_t bits(int value, Half) {
  const uint16_t sizes[] = {0, 0x3c00, 0x4000, 0x4200, 0x4400};
  return uint16_t(sizes[std::abs(value)] | (value < 0 ? 0x8000 : 0));
}
inline uint16_t bits(int value, BFloat16) { return uint16_t(bits(value, float{}) >> 16); }

// Small integers, and the same as elements on the GPU.
template <typename T>
struct Values {
  using Bits = decltype(bits(0, T{}));
  std::vector<int> host;
  Bits* device = nullptr;

  Values(size_t count, uint32_t seed) : host(count) {
    std::vector<Bits> elements(count);
    for (size_t i = 0; i < count; ++i) elements[i] = bits(host[i] = small_integer(seed), T{});
    check(cudaMalloc(&device, count * sizeof(Bits)), "cudaMalloc");
    check(cudaMemcpy(device, elements.data(), count * sizeof(Bits), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Values(const Values&) = delete;
  ~Values() { cudaFree(device); }
};

// What a kernel writes, all bits set until it has.
template <typename E>
struct Results {
  std::vector<E> host;
  E* device = nullptr;

  explicit Results(size_t count) : host(count) { check(cudaMalloc(&device, count * sizeof(E)), "cudaMalloc"); }
  Results(const Results&) = delete;
  ~Results() { cudaFree(device); }
  void clear() { check(cudaMemset(device, 0xff, host.size() * sizeof(E)), "cudaMemset"); }
  void fetch() {
    check(cudaMemcpy(host.data(), device, host.size() * sizeof(E), cudaMemcpyDeviceToHost), "the kernel");
  }
};

// What main returns: the number of failures of `run`.
template <typename Run>
int count_failures(const Run& run) {
  try {
    run();
  } catch (const std::exception& error) {
    report(false, "the probe itself", error.what());
  }
  return failures;
}

// Copies `count` points of 16 bytes to shared memory as the kernels do, and lets warpgroup MMA see them.
__device__ inline void copy_points(unsigned char* to, const void* from, int count) {
  for (int i = threadIdx.x; i < count; i += int(blockDim.x))
    copy_async<16>(to + i * 16, static_cast<const unsigned char*>(from) + i * 16, true);
  copy_async_commit();
  copy_async_wait<0>();
  fence_proxies();
  __syncthreads();
}

// The point under point (y, x) of the middle plane.
__host__ __device__ inline int centre(int y, int x) { return (kReachZ * kRows + kReach + y) * kPitch + kReach + x; }
__host__ __device__ inline int shift(int z, int y, int x) { return (z * kRows + y) * kPitch + x; }

}  // namespace probe
