// Does ldmatrix take rows that begin at any 16 bytes, plain and transposed, and hand each lane the elements that
// device.h says? GPUs without warpgroup MMA read their windows so.
//
//   nvcc -std=c++17 -O3 -arch=sm_80 -o unaligned_ldmatrix unaligned_ldmatrix.cu && ./unaligned_ldmatrix
#include "probe.h"

using namespace probe;

// out [32 lanes][4 matrices][2 elements], matrix m being eight points from `start` + m * `apart` on.
template <bool kTransposed>
__global__ __launch_bounds__(32) void load(const uint16_t* points, uint16_t* out, int start, int apart) {
  copy_points(shared_memory(), points, kPoints);
  uint32_t words[4];
  load_matrices<kTransposed>(words, shared_units(shared_memory()) + start + threadIdx.x / 8 * apart + threadIdx.x % 8);
  for (int m = 0; m < 4; ++m) memcpy(out + (threadIdx.x * 4 + m) * 2, &words[m], 4);
}

template <bool kTransposed>
void run(const char* name) {
  // Each element has its own number.
  std::vector<uint16_t> values(size_t(kPoints) * kChannels<Half>);
  for (size_t i = 0; i < values.size(); ++i) values[i] = uint16_t(i);
  Results<uint16_t> points(values.size()), out(32 * 4 * 2);
  check(cudaMemcpy(points.device, values.data(), values.size() * 2, cudaMemcpyHostToDevice), "cudaMemcpy");
  int wrong = 0, loads = 0;
  for (int start = 0; start < 2 * kPitch; ++start)
    for (int apart = 1; apart <= kPitch; ++apart, ++loads) {
      out.clear();
      launch(name, &load<kTransposed>, dim3(1), 32, kPoints * 16, nullptr, points.device, out.device, start, apart);
      out.fetch();
      for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < 4; ++m)
          for (int e = 0; e < 2; ++e) {
            const int row = kTransposed ? lane % 4 * 2 + e : lane / 4,
                      column = kTransposed ? lane / 4 : lane % 4 * 2 + e;
            wrong += out.host[(lane * 4 + m) * 2 + e] != values[(start + m * apart + row) * kChannels<Half> + column];
          }
    }
  char numbers[96];
  std::snprintf(numbers, sizeof(numbers), "%d of %d elements wrong in %d loads", wrong, loads * 256, loads);
  report(wrong == 0, name, numbers);
}

int main() {
  return count_failures([] {
    run<false>("ldmatrix at unaligned rows");
    run<true>("ldmatrix at unaligned rows, transposed");
  });
}
