// What tests of the emulation call besides the operators: checks of the lattice arithmetic point by point, conversions
// of 16-bit numbers, and kernels with a planted error that the emulation must notice.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/windows/parts.h"
#include "cuda_emulation.h"

namespace {

using namespace autofocus;
using namespace autofocus::cuda;

std::string show(const char* what, const Index3& p, int tz, int tap, int k) {
  return std::string(what) + " at target " + std::to_string(p.z) + "," + std::to_string(p.y) + "," +
         std::to_string(p.x) + " tz " + std::to_string(tz) + " tap " + std::to_string(tap) + " branch " +
         std::to_string(k);
}

bool same(const Index3& a, const Index3& b) { return a.z == b.z && a.y == b.y && a.x == b.x; }

// Finds the position of every packed point. False if two points share a place or a place stays empty.
bool positions_of_packed(const Int3& class_size, int first_plane, const Int3& step, const Classes& classes,
                         std::vector<Index3>& position) {
  const int64_t points = volume(class_size) * volume(classes.count);
  std::vector<bool> taken(points, false);
  position.resize(points);
  for (int64_t i = 0; i < points; ++i) {
    int packed = -1;
    const Index3 p = unpacked_position(class_size, first_plane, step, classes, int(i), packed);
    if (packed < 0 || packed >= points || taken[packed]) return false;
    taken[packed] = true;
    position[packed] = p;
  }
  return true;
}

// Goes through the tiles of one part as the kernels do, with numbers of points instead of data, and compares every read
// with the definition. `recycle`: with the smallest ring. Counts in `covered` how often a target point is in a tile.
// Returns what is wrong, empty if nothing is.
std::string check_part(const Problem& g, const Part& part, bool adjoint, int tile_z, bool recycle,
                       std::vector<int>& covered) {
  constexpr int64_t kZero = -1, kNothing = -2;
  const Direction direction = adjoint ? Direction::kAdjoint : Direction::kForward;
  Lattice lattice = make_lattice(g, direction, 0, g.K);
  set_tile(lattice, tile_z);
  set_ring(lattice, recycle ? fewest_planes(lattice) : planes(lattice));
  restrict_to(lattice, part, direction);

  std::vector<Index3> position, target_position_of;
  if (!positions_of_packed(lattice.points, lattice.first_plane, lattice.step, lattice.source_classes, position) ||
      !positions_of_packed(lattice.target_points, 0, lattice.step, lattice.target_classes, target_position_of))
    return "packing is no permutation";

  const int64_t tiles_of_sample = num_tiles(lattice) / lattice.N;
  for (int64_t index = 0; index < num_tiles(lattice); ++index) {
    const Tile tile = tile_at(lattice, int(index));
    if (tile.n != index / tiles_of_sample) return "a tile belongs to the wrong sample";
    if (tile.n > 0) continue;
    for (int turn = 0; turn < lattice.sources; ++turn) {
      const int first_branch = turn, branches_end = lattice.sources == 1 ? lattice.K : turn + 1;
      const Int3& reach = lattice.reach[turn];
      std::vector<int64_t> held;
      const auto place_of = [&](int plane) { return int64_t(plane % lattice.ring) * lattice.plane_points; };
      const auto stage = [&](int plane) {
        for (int row = 0; row < rows(reach); ++row)
          for (int column = 0; column < columns(reach); ++column) {
            const Int3& first = tile.source_first;
            const int block_plane = first_held(lattice, turn) + plane, block_row = first_row(lattice, turn) + row,
                      block_column = first_column(lattice, turn) + column;
            const bool there = first.z + block_plane >= 0 && first.z + block_plane < lattice.points.z &&
                               has_row(lattice, first, block_row) && has_column(lattice, first, block_column);
            held.at(place_of(plane) + row * lattice.pitch[turn] + column) =
                there ? packed_index(lattice, tile, block_plane, block_row, block_column) : kZero;
          }
      };
      for (int tz = -1; tz <= 1; ++tz) {
        // Stages what has been waited for up to tz and is not free yet. Everything else is kNothing.
        held.assign(int64_t(lattice.ring) * lattice.plane_points, kNothing);
        const int begin = first_read(lattice, turn, tz), end = end_read(lattice, turn, tz);
        if (end - begin > lattice.ring) return "what a tz reads does not fit the ring";
        if (tz < 1 && end < first_read(lattice, turn, tz + 1)) return "a plane is freed that nobody has waited for";
        for (int plane = begin; plane < end; ++plane) stage(plane);
        for (int z = 0; z < tile_z; ++z)
          for (int y = 0; y < kTileY; ++y)
            for (int x = 0; x < kTileX; ++x) {
              const Index3 p = target_position(lattice, tile, z, y, x);
              if (has_target(tile, z, y, x) != inside(p, lattice.target)) return "a tile has other target points";
              if (!inside(p, lattice.target)) continue;
              if (turn == 0 && tz == 0 && part.first_sample == 0) ++covered[ravel(p, lattice.target)];
              if (!same(target_position_of.at(packed_target(lattice, tile, z, y, x)), p))
                return "a target point is packed elsewhere";
              for (int tap = 0; tap < kPlaneTaps; ++tap)
                for (int k = first_branch; k < branches_end; ++k) {
                  const int place = lattice.centre[k] + y * lattice.pitch[k] + x + lattice.tap_points[tap][k];
                  if (place < 0 || place >= lattice.plane_points) return show("a tap leaves its plane", p, tz, tap, k);
                  const int wait = tz >= 0 ? readers(lattice) + tz : lattice.sources == 1 ? lattice.K - 1 - k : 0;
                  if (tap_plane(lattice, z, tz, k) >= lattice.planes_read[turn][wait])
                    return show("a branch reads a plane that it has not waited for", p, tz, tap, k);
                  const int64_t read = held.at(place_of(tap_plane(lattice, z, tz, k)) + place);
                  // By definition, forward reads origin + p + r t; the adjoint reads the output that reads p through
                  // -t.
                  const int64_t sign = adjoint ? -1 : 1;
                  const Index3 s = {sign * g.origin.z + p.z + g.dilation[k].z * tz,
                                    sign * g.origin.y + p.y + g.dilation[k].y * (tap / 3 - 1),
                                    sign * g.origin.x + p.x + g.dilation[k].x * (tap % 3 - 1)};
                  if (read == kNothing) return show("a tap reads a point that is not loaded", p, tz, tap, k);
                  const bool zero = read == kZero || !inside(position[read], lattice.source);
                  if (inside(s, lattice.source) ? zero || !same(position[read], s) : !zero)
                    return show("a tap reads the wrong point", p, tz, tap, k);
                }
            }
      }
    }
  }
  return "";
}

// The same for all parts of a split, which must have every target point in exactly one tile.
std::string check_lattice(const Problem& g, const Split& split, bool adjoint, int tile_z, bool recycle) {
  std::vector<int> covered(volume(adjoint ? g.input : g.output), 0);
  for (int64_t i = 0; i < num_parts(split); ++i) {
    const std::string problem = check_part(g, part_of(g, split, i), adjoint, tile_z, recycle, covered);
    if (!problem.empty()) return problem;
  }
  for (const int count : covered)
    if (count != 1) return "a target point is in " + std::to_string(count) + " tiles";
  return "";
}

// ------------------------------------------------------------------ kernels with a planted error

constexpr int kProbeBytes = 512;  // shared memory of a faulty kernel

void unfinished_copy(const float* source, float* result) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x == 0) copy_async<16>(shared_memory(), source, true);
  copy_async_commit();
  __syncthreads();  // without copy_async_wait
  if (threadIdx.x < 4) result[threadIdx.x] = shared[threadIdx.x];
}

void missing_barrier(const float*, float* result) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = float(threadIdx.x);
  if (threadIdx.x < 4) result[threadIdx.x] = shared[threadIdx.x + 1];
}

void split_barrier(const float*, float*) {
  if (threadIdx.x < 8)
    __syncthreads();
  else
    shuffle_xor(0.0f, 1);
}

void write_behind(const float*, float*) { shared_memory()[kProbeBytes + threadIdx.x] = 1; }

void write_behind_scratch(const float*, float*) {
  static unsigned char scratch[16 + emulation::kScratchGuard];
  if (threadIdx.x > 0) return;
  std::memset(scratch, emulation::kPoison, sizeof(scratch));
  emulation::guard_scratch(scratch, 16);
  scratch[16] = 0;
}

void misaligned_access(const float*, float*) { *reinterpret_cast<uint2*>(shared_memory() + 4) = {0, 0}; }

void misaligned_copy(const float* source, float*) { copy_async<16>(shared_memory() + 4, source, true); }

// One product by one warp, of operand a at `start` (units of 16 bytes) and operand b at 0.
void product(uint32_t start, bool committed) {
  float d[2][4];
  warpgroup_begin();
  warpgroup_mma<Half>(d, uint64_t(8) << 32 | start, uint64_t(8) << 32, false);
  if (committed) warpgroup_commit();
  warpgroup_wait<0>();
}

void unfenced_copy(const float* source, float*) {
  copy_async<16>(shared_memory(), source, true);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  product(0, true);
}

void operand_behind(const float*, float*) { product(20, true); }

void uncommitted_product(const float*, float*) { product(0, false); }

void unrounded_operand(const float* source, float*) {
  float d[4] = {};
  uint32_t bits;
  std::memcpy(&bits, source, sizeof(bits));
  mma<float>(d, {bits, bits, bits, bits | 1}, {bits, bits});
}

void lanes_disagree(const float*, float*) { product(threadIdx.x % 2, true); }

// A bulk copy of 16 bytes to byte `at`. Its barrier is fenced or not, gets `arrivals` and expects `bytes`.
CopyBarrier& copy_16_bytes(const float* source, bool fenced, int arrivals, int bytes, int at = 0) {
  CopyBarrier& barrier = *reinterpret_cast<CopyBarrier*>(shared_memory() + 256);
  if (threadIdx.x == 0) {
    init_barrier(barrier);
    if (fenced) fence_proxies();
    expect_bytes(barrier, bytes);
    copy_bulk(shared_memory() + at, source, 16, barrier);
    for (int i = 0; i < arrivals; ++i) arrive(barrier);
  }
  __syncthreads();
  return barrier;
}

void leave_result(float* result) {
  if (threadIdx.x < 4) result[threadIdx.x] = reinterpret_cast<float*>(shared_memory())[threadIdx.x];
}

void bulk_copy(const float* source, float* result) {
  wait_for_copies(copy_16_bytes(source, true, 1, 16), 0);
  leave_result(result);
}

void unfinished_bulk_copy(const float* source, float* result) {
  CopyBarrier& barrier = copy_16_bytes(source, true, 1, 16);
  leave_result(result);
  wait_for_copies(barrier, 0);
}

void unfenced_barrier(const float* source, float*) { copy_16_bytes(source, false, 1, 16); }
void misaligned_bulk_copy(const float* source, float*) { copy_16_bytes(source, true, 1, 16, 8); }
void bytes_that_never_come(const float* source, float*) { wait_for_copies(copy_16_bytes(source, true, 1, 32), 0); }
void arrival_that_never_comes(const float* source, float*) { wait_for_copies(copy_16_bytes(source, true, 0, 16), 0); }
void second_arrival(const float* source, float*) { copy_16_bytes(source, true, 2, 16); }
void left_under_way(const float* source, float*) { copy_16_bytes(source, true, 1, 16); }

void unfenced_read(const float* source, float*) {
  uint32_t words[4];
  load_matrices<false>(words, threadIdx.x);
  __syncthreads();
  wait_for_copies(copy_16_bytes(source, true, 1, 16, 64), 0);
}

void misaligned_plane(const float* source, float*) {
  if (threadIdx.x == 0)
    copy_plane(shared_memory() + 64, plane_map(source, 1, 1, 1, 1, 1, 1), 0, 0, 0, 0,
               *reinterpret_cast<CopyBarrier*>(shared_memory() + 256));
}

using Faulty = void (*)(const float*, float*);
struct NamedKernel {
  const char* name;
  Faulty kernel;
};
#define NAMED(kernel) {#kernel, kernel}
const NamedKernel kFaulty[] = {NAMED(unfinished_copy),
                               NAMED(missing_barrier),
                               NAMED(split_barrier),
                               NAMED(write_behind),
                               NAMED(write_behind_scratch),
                               NAMED(misaligned_access),
                               NAMED(misaligned_copy),
                               NAMED(unfenced_copy),
                               NAMED(operand_behind),
                               NAMED(uncommitted_product),
                               NAMED(lanes_disagree),
                               NAMED(unrounded_operand),
                               NAMED(bulk_copy),
                               NAMED(unfinished_bulk_copy),
                               NAMED(unfenced_barrier),
                               NAMED(misaligned_bulk_copy),
                               NAMED(bytes_that_never_come),
                               NAMED(arrival_that_never_comes),
                               NAMED(second_arrival),
                               NAMED(left_under_way),
                               NAMED(misaligned_plane),
                               NAMED(unfenced_read)};

}  // namespace

extern "C" {

// Checks the lattice of a problem; `numbers` are N, K, input z y x, output z y x, origin z y x, then K dilations z y x.
// `apart`: in parts, one for each sample and class, in the adjoint also for slabs. True if all is right, else `message`
// says what is wrong.
bool autofocus_probe_lattice(const int64_t* numbers, bool adjoint, int tile_z, bool recycle, bool apart, char* message,
                             int size) {
  Problem g{};
  g.N = numbers[0];
  g.C = g.O = 1;
  g.K = numbers[1];
  g.kernel = {3, 3, 3};
  g.stride = {1, 1, 1};
  g.input = {numbers[2], numbers[3], numbers[4]};
  g.output = {numbers[5], numbers[6], numbers[7]};
  g.origin = {numbers[8], numbers[9], numbers[10]};
  for (int64_t k = 0; k < g.K; ++k) g.dilation[k] = {numbers[11 + 3 * k], numbers[12 + 3 * k], numbers[13 + 3 * k]};
  const char* refusal = lattice_refusal(g);
  const int points = lattice_points(g.input, common_step(g)).z, slabs = int(ceil_div(points, slab_planes(points, 3)));
  const Split split = apart ? Split{g.N, common_step(g), adjoint ? slabs : 1} : Split{1, {1, 1, 1}, 1};
  const std::string problem = refusal != nullptr ? refusal : check_lattice(g, split, adjoint, tile_z, recycle);
  std::snprintf(message, size, "%s", problem.c_str());
  return problem.empty();
}

void autofocus_probe_decode(bool half, const uint16_t* bits, float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    values[i] = half ? emulation::half_to_float(bits[i]) : emulation::bfloat16_to_float(bits[i]);
}

void autofocus_probe_encode(bool half, const float* values, uint16_t* bits, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    bits[i] = half ? emulation::float_to_half(values[i]) : emulation::float_to_bfloat16(values[i]);
}

// Runs a kernel of kFaulty with one warp; `result` holds four floats. True if the emulation ran it to the end, else
// `message` has its error.
bool autofocus_probe_fault(const char* name, float* result, char* message, int size) {
  alignas(16) const float source[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  for (const NamedKernel& faulty : kFaulty)
    if (std::string(name) == faulty.name) {
      try {
        launch(name, faulty.kernel, dim3(1), 32, kProbeBytes, nullptr, source, result);
      } catch (const std::runtime_error& error) {
        std::snprintf(message, size, "%s", error.what());
        return false;
      }
      return true;
    }
  std::snprintf(message, size, "no such kernel");
  return false;
}
}
