// Is a window of points, at any shift, operand b with its points as what is summed over (MN-major), the three taps of a
// row side by side? So the gradient of the weight reads them: csrc/cuda/windows/grad_weight.cu.
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -o transposed_windows transposed_windows.cu &&
//   ./transposed_windows
#include "probe.h"

using namespace probe;

constexpr int kOutputs = 64, kColumns = 24;  // three taps of eight channels
constexpr int kSteps = 4;                    // of 16 points, two rows: a plane

// out [64][24] = sum over the points of a plane of grad [64][64 points] and the taps (z, y, -1 .. 1) at this rate.
template <typename T>
__global__ __launch_bounds__(kGroups * 128) void multiply_over_points(const uint16_t* points, const uint16_t* grad,
                                                                      float* out, int z, int y, int rate, int repeat,
                                                                      long long* cycles) {
  copy_points(shared_memory(), points, kPoints);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  uint32_t a[kSteps][4];
  for (int step = 0; step < kSteps; ++step)
    for (int i = 0; i < 4; ++i) {
      const int point = step * 16 + i / 2 * 8 + lane % 4 * 2;
      memcpy(&a[step][i], grad + (row + i % 2 * 8) * 64 + point, 4);
    }
  const uint32_t window = shared_units(shared_memory()) + centre(0, 0) + shift(z, y * rate, -rate);
  float d[1][3][4];
  const long long began = clock64();
#pragma unroll 1  // ptxas removes products whose sums the next round in the same body overwrites
  for (int n = 0; n < repeat; ++n) {
    clear(d);
    begin_products();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      window_product_over_points<T>(d, a[step], {window + 2 * step * kPitch, kPitch, uint32_t(rate)});
    commit_products();
    wait_for_products<0>(d);
  }
  __syncthreads();
  if (threadIdx.x == 0) *cycles = clock64() - began;
  if (threadIdx.x >= 128) return;
  for (int tile = 0; tile < 3; ++tile)
    for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * kColumns + tile * 8 + lane % 4 * 2 + i % 2] = d[0][tile][i];
}

template <typename T>
void run(const char* name) {
  constexpr int kShared = kPoints * 16;
  Values<T> points(size_t(kPoints) * kChannels<T>, 3), grad(kOutputs * 64, 4);
  Results<float> out(kOutputs * kColumns);
  Results<long long> cycles(1);
  const auto multiply = [&](int z, int y, int rate, int repeat) {
    launch(name, &multiply_over_points<T>, dim3(1), kGroups * 128, kShared, nullptr, points.device, grad.device,
           out.device, z, y, rate, repeat, cycles.device);
  };
  int wrong = 0, windows = 0;
  for (int rate = 0; rate <= kReach; ++rate)  // 0: of an axis with one tap
    for (int z = -kReachZ; z <= kReachZ; ++z)
      for (int y = -1; y <= 1; ++y, ++windows) {
        out.clear();
        multiply(z, y, rate, 1);
        out.fetch();
        for (int o = 0; o < kOutputs; ++o)
          for (int column = 0; column < kColumns; ++column) {
            int sum = 0;
            for (int p = 0; p < 64; ++p)
              sum += grad.host[o * 64 + p] *
                     points.host[(centre(p / 8, p % 8) + shift(z, y * rate, (column / 8 - 1) * rate)) * kChannels<T> +
                                 column % 8];
            wrong += !(out.host[o * kColumns + column] == float(sum));
          }
      }
  multiply(0, 0, 3, kRepeat);
  cycles.fetch();
  char numbers[160];
  std::snprintf(numbers, sizeof(numbers),
                "%d of %d values wrong in %d windows; %.1f cycles a product of 64 outputs, 16 points, 24 columns",
                wrong, windows * kOutputs * kColumns, windows,
                double(cycles.host[0]) / (kRepeat * double(kSteps) * kGroups));
  report(wrong == 0, name, numbers);
}

int main() {
  return count_failures([] {
    run<BFloat16>("transposed windows, bfloat16");
    run<Half>("transposed windows, float16");
  });
}
