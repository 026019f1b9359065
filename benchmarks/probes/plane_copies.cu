// Does the copy engine bring a plane of points from any place of a volume, or half or wholly outside it with zeros
// there, to shared memory with its rows one behind the other; and does a barrier count the bytes of such copies and of
// plain ones, phase after phase, even those that land before they are expected? GPUs from compute capability 9.0 on
// stage their points so.
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -o plane_copies plane_copies.cu && ./plane_copies
#include "probe.h"

using namespace probe;

constexpr int kWords = 4;                  // of a point
constexpr int kPlaneBytes = 22 * 22 * 16;  // the largest
constexpr int kSlotBytes = (kPlaneBytes + 127) / 128 * 128;
constexpr int kSlots = 20;
constexpr int kSideBytes = 640;  // of the plain copy
constexpr int kThreads = 128;
constexpr int kSharedBytes = kSlots * kSlotBytes + kSideBytes + 2 * int(sizeof(CopyBarrier));

// Points of a volume, and how many volumes.
struct Sizes {
  int volumes, z, y, x;
};
struct Place {
  int x, y, z, volume;
};

// Place number i of those tried: rows and columns that begin before, in and behind the volume, all planes and two more.
__host__ __device__ inline Place place_of(const Sizes& sizes, int i) {
  const int x = i % 9, y = i / 9 % 6, z = i / 54 % (sizes.z + 2);
  return {7 * x - 23, 7 * y - 23, z - 1, i / (54 * (sizes.z + 2)) % sizes.volumes};
}
__host__ __device__ inline int num_places(const Sizes& sizes) { return 54 * (sizes.z + 2) * sizes.volumes; }

// The same volumes, with the columns and rows of the copy and with one of each, in turn.
struct Maps {
  PlaneMap of[2];
};

__device__ inline CopyBarrier& barrier_of(int which) {
  return reinterpret_cast<CopyBarrier*>(shared_memory() + kSlots * kSlotBytes + kSideBytes)[which];
}

__device__ inline void init_barriers() {
  if (threadIdx.x == 0) {
    init_barrier(barrier_of(0));
    init_barrier(barrier_of(1));
    fence_proxies();
  }
  __syncthreads();
}

// Every place by turns of a barrier and into one slot of three, the next one under way while one is compared, by the
// one map and the other; beside each a plain copy of the first words, and a phase that expects nothing behind. Counts
// the words that are wrong.
__global__ __launch_bounds__(kThreads) void compare(const __grid_constant__ Maps maps, const uint32_t* words,
                                                    Sizes sizes, int columns, int rows, int side_bytes, int* wrong) {
  init_barriers();
  const int places = num_places(sizes);
  const auto plane_bytes = [&](int i) { return i % 3 == 0 ? 16 : columns * rows * 16; };
  const auto is_late = [](int i) { return i % 8 == 7; };  // expects its bytes when most have landed
  const auto begin = [&](int i) {
    if (threadIdx.x > 0) return;
    const Place p = place_of(sizes, i);
    CopyBarrier& landed = barrier_of(i % 2);
    if (!is_late(i)) expect_bytes(landed, plane_bytes(i));
    if (i % 4 < 2) expect_bytes(landed, side_bytes);
    if (i % 4 == 0) arrive(landed);
    copy_plane(shared_memory() + i % 3 * kSlotBytes, maps.of[i % 3 == 0], p.x, p.y, p.z, p.volume, landed);
    if (i % 4 >= 2 && !is_late(i)) expect_bytes(landed, side_bytes);
    copy_bulk(shared_memory() + kSlots * kSlotBytes + i % 2 * (kSideBytes / 2), words, side_bytes, landed);
    if (i % 4 != 0 && !is_late(i)) arrive(landed);
  };
  int own = 0;
  begin(0);
  for (int i = 0; i < places; ++i) {
    if (i + 1 < places) begin(i + 1);
    if (is_late(i) && threadIdx.x == 0) {
      expect_bytes(barrier_of(i % 2), plane_bytes(i) + side_bytes);
      arrive(barrier_of(i % 2));
    }
    wait_for_copies(barrier_of(i % 2), 0);
    __syncthreads();  // or one that comes late would wait for the phase after the next
    if (threadIdx.x == 0) {
      expect_bytes(barrier_of(i % 2), 0);
      arrive(barrier_of(i % 2));
    }
    wait_for_copies(barrier_of(i % 2), 1);
    const Place p = place_of(sizes, i);
    const int columns_here = i % 3 == 0 ? 1 : columns, rows_here = i % 3 == 0 ? 1 : rows;
    const uint32_t* slot = reinterpret_cast<const uint32_t*>(shared_memory() + i % 3 * kSlotBytes);
    for (int at = int(threadIdx.x); at < columns_here * rows_here * kWords; at += kThreads) {
      const int x = p.x + at / kWords % columns_here, y = p.y + at / kWords / columns_here;
      const bool there = x >= 0 && x < sizes.x && y >= 0 && y < sizes.y && p.z >= 0 && p.z < sizes.z;
      const int point = ((p.volume * sizes.z + p.z) * sizes.y + y) * sizes.x + x;
      own += slot[at] != (there ? words[point * kWords + at % kWords] : 0u);
    }
    const uint32_t* side =
        reinterpret_cast<const uint32_t*>(shared_memory() + kSlots * kSlotBytes + i % 2 * (kSideBytes / 2));
    for (int at = int(threadIdx.x); at < side_bytes / 4; at += kThreads) own += side[at] != words[at];
    fence_proxies();
    __syncthreads();
  }
  wrong[threadIdx.x] = own;
}

// All slots at once, from planes of a block's own, `repeat` times.
__global__ __launch_bounds__(kThreads) void time_planes(const __grid_constant__ PlaneMap map, int repeat,
                                                        long long* cycles) {
  init_barriers();
  const long long begun = clock64();
  for (int i = 0; i < repeat; ++i) {
    if (threadIdx.x == 0) {
      expect_bytes(barrier_of(0), kSlots * kPlaneBytes);
      for (int slot = 0; slot < kSlots; ++slot)
        copy_plane(shared_memory() + slot * kSlotBytes, map, i % 8, i % 8, slot, int(blockIdx.x), barrier_of(0));
      arrive(barrier_of(0));
    }
    wait_for_copies(barrier_of(0), uint32_t(i % 2));
    __syncthreads();
  }
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begun;
}

void compare_all(const Sizes& sizes, int columns, int rows) {
  std::vector<uint32_t> values(size_t(sizes.volumes) * sizes.z * sizes.y * sizes.x * kWords);
  for (size_t i = 0; i < values.size(); ++i) values[i] = uint32_t(i) + 1;
  Results<uint32_t> words(values.size());
  check(cudaMemcpy(words.device, values.data(), values.size() * 4, cudaMemcpyHostToDevice), "cudaMemcpy");
  Results<int> wrong(kThreads);
  wrong.clear();
  Maps maps;
  maps.of[0] = plane_map(words.device, sizes.volumes, sizes.z, sizes.y, sizes.x, columns, rows);
  maps.of[1] = plane_map(words.device, sizes.volumes, sizes.z, sizes.y, sizes.x, 1, 1);
  const int side_bytes = values.size() * 4 < kSideBytes / 2 ? int(values.size() * 4) : kSideBytes / 2;
  launch("compare", &compare, dim3(1), kThreads, kSharedBytes, nullptr, maps, words.device, sizes, columns, rows,
         side_bytes, wrong.device);
  wrong.fetch();
  long long all = 0;
  for (const int count : wrong.host) all += count;
  char what[64], numbers[96];
  std::snprintf(what, sizeof(what), "planes of %d x %d points, volumes of %d x %d x %d", rows, columns, sizes.z,
                sizes.y, sizes.x);
  std::snprintf(numbers, sizeof(numbers), "%lld words wrong in %d copies", all, num_places(sizes));
  report(all == 0, what, numbers);
}

void time_all() {
  const int blocks = kRepeat > 1 ? device_limits().multiprocessors : 1, repeat = kRepeat > 1 ? 50 : 2;
  constexpr int kSide = 32;
  Results<uint32_t> words(size_t(blocks) * kSlots * kSide * kSide * kWords);
  words.clear();
  Results<long long> cycles(blocks);
  launch("time_planes", &time_planes, dim3(blocks), kThreads, kSharedBytes, nullptr,
         plane_map(words.device, blocks, kSlots, kSide, kSide, 22, 22), repeat, cycles.device);
  cycles.fetch();
  long long sum = 0;
  for (const long long of_block : cycles.host) sum += of_block;
  const double each = double(sum) / blocks / repeat;
  char numbers[128];
  std::snprintf(numbers, sizeof(numbers),
                "%.0f cycles for %d planes of 7744 bytes in all of %d blocks at once: %.1f bytes a cycle", each, kSlots,
                blocks, each > 0 ? kSlots * kPlaneBytes / each : 0.0);
  report(true, "speed of planes", numbers);
}

int main() {
  return count_failures([] {
    if (!device_has_bulk_copies())
      return report(true, "planes", "this GPU has no copy engine, and is not asked for one");
    for (const Sizes& sizes : {Sizes{3, 4, 9, 30}, Sizes{2, 1, 1, 1}, Sizes{5, 2, 3, 4}})
      for (const int columns : {8, 10, 22})
        for (const int rows : {8, 22}) compare_all(sizes, columns, rows);
    time_all();
  });
}
