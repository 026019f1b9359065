// Is an 8x8 window of points, at any shift, operand a of the tensor cores' product (K-major), two taps side by side in
// k? By warpgroup MMA and descriptors in code for sm_90a, by ldmatrix and mma.sync elsewhere:
// csrc/cuda/windows/product.h.
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -o shifted_windows shifted_windows.cu &&
//   ./shifted_windows
#include "probe.h"

using namespace probe;

constexpr int kTaps = 9, kSlabTaps = 10;  // of one plane; the last product's second tap has a weight of zero

// out [64][8 kTiles] = the nine taps of plane z at this rate, by the first warpgroup; all of them repeat it to be
// timed.
template <typename T, int kTiles>
__global__ __launch_bounds__(kGroups * 128) void multiply_windows(const void* points, const void* weight, float* out,
                                                                  int z, int rate, int repeat, long long* cycles) {
  copy_points(shared_memory(), points, kPoints);
  copy_points(shared_memory() + kPoints * 16, weight, kSlabTaps * 8 * kTiles);
  const uint32_t window = shared_units(shared_memory()) + centre(0, 0) + shift(z, 0, 0);
  const uint32_t slab = shared_units(shared_memory() + kPoints * 16);
  float d[1][kTiles][4];
  const long long began = clock64();
#pragma unroll 1  // ptxas removes products whose sums the next round in the same body overwrites
  for (int n = 0; n < repeat; ++n) {
    begin_products();
#pragma unroll
    for (int tap = 0; tap < kTaps; tap += 2) {
      const int next = tap + 1 < kTaps ? tap + 1 : tap;
      const int from = shift(0, tap / 3 - 1, tap % 3 - 1) * rate, to = shift(0, next / 3 - 1, next % 3 - 1) * rate;
      const Operand a[1] = {{window + from, uint32_t(to - from), kPitch}};
      window_product<T>(d, a, {slab + tap * (8 * kTiles), 8 * kTiles, 8}, tap > 0);
    }
    commit_products();
    wait_for_products<0>(d);
  }
  __syncthreads();
  if (threadIdx.x == 0) *cycles = clock64() - began;
  if (threadIdx.x >= 128) return;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  for (int tile = 0; tile < kTiles; ++tile)
    for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * (8 * kTiles) + tile * 8 + lane % 4 * 2 + i % 2] = d[0][tile][i];
}

template <typename T, int kTiles>
void run(const char* name) {
  constexpr int kOutputs = 8 * kTiles, kShared = (kPoints + kSlabTaps * kOutputs) * 16;
  Values<T> points(size_t(kPoints) * kChannels<T>, 1), weight(size_t(kSlabTaps) * kOutputs * kChannels<T>, 2);
  // The last tap is nobody's.
  check(cudaMemset(weight.device + size_t(kTaps) * kOutputs * kChannels<T>, 0, kOutputs * 16), "cudaMemset");
  Results<float> out(64 * kOutputs);
  Results<long long> cycles(1);
  const auto multiply = [&](int z, int rate, int repeat) {
    launch(name, &multiply_windows<T, kTiles>, dim3(1), kGroups * 128, kShared, nullptr,
           static_cast<const void*>(points.device), static_cast<const void*>(weight.device), out.device, z, rate,
           repeat, cycles.device);
  };
  int wrong = 0, windows = 0;
  for (int rate = 0; rate <= kReach; ++rate)  // 0: of an axis with one tap
    for (int z = -kReachZ; z <= kReachZ; ++z, ++windows) {
      out.clear();
      multiply(z, rate, 1);
      out.fetch();
      for (int p = 0; p < 64; ++p)
        for (int o = 0; o < kOutputs; ++o) {
          int sum = 0;
          for (int tap = 0; tap < kTaps; ++tap)
            for (int c = 0; c < kChannels<T>; ++c)
              sum += points.host[(centre(p / 8, p % 8) + shift(z, (tap / 3 - 1) * rate, (tap % 3 - 1) * rate)) *
                                     kChannels<T> +
                                 c] *
                     weight.host[(tap * kOutputs + o) * kChannels<T> + c];
          wrong += !(out.host[p * kOutputs + o] == float(sum));
        }
    }
  multiply(0, 3, kRepeat);
  cycles.fetch();
  char numbers[160];
  std::snprintf(numbers, sizeof(numbers),
                "%d of %d values wrong in %d windows; %.1f cycles a product of 64 points, two taps, %d outputs", wrong,
                windows * 64 * kOutputs, windows, double(cycles.host[0]) / (kRepeat * 5.0 * kGroups), kOutputs);
  report(wrong == 0, name, numbers);
}

int main() {
  return count_failures([] {
    run<BFloat16, 2>("shifted windows, bfloat16, N = 16");
    run<BFloat16, 4>("shifted windows, bfloat16, N = 32");
    run<BFloat16, 5>("shifted windows, bfloat16, N = 40");
    run<BFloat16, 8>("shifted windows, bfloat16, N = 64");
    run<Half, 4>("shifted windows, float16, N = 32");
    run<float, 2>("shifted windows, TF32, N = 16");
    run<float, 4>("shifted windows, TF32, N = 32");
    run<float, 5>("shifted windows, TF32, N = 40");
    run<float, 8>("shifted windows, TF32, N = 64");
  });
}
