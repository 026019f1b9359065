// Fast tier: what it takes, tile sizes, and the packing of its operands. Packing moves 16-bit patterns and computes nothing.
#include "fast.h"

namespace autofocus::cuda {

namespace {

constexpr int kPackThreads = 256;

unsigned int pack_blocks(int64_t items) { return static_cast<unsigned int>(ceil_div(items, kPackThreads)); }

int shared_bytes(const Lattice& g, Pass pass) {
  int bytes = g.ring * plane_size(g) * kPointBytes + 2 * int(sizeof(Tile));
  if (pass == Pass::kGradInput) bytes += planes(g) * plane_size(g) * kGateBytes;
  // share_attention, which the forward needs only with a branch scale.
  if (pass == Pass::kGradWeight || pass == Pass::kForward) bytes += g.tile_z * kTileY * kTileX * kGateBytes;
  return bytes;
}

Direction direction(Pass pass) {
  return pass == Pass::kGradInput || pass == Pass::kBranchGradInput ? Direction::kAdjoint : Direction::kForward;
}

}  // namespace

const char* make_plan(const Problem& g, DType dtype, Pass pass, Plan& plan) {
  if (dtype != DType::kFloat16 && dtype != DType::kBFloat16) return "the dtype is not float16 or bfloat16";
  if (const char* refusal = lattice_refusal(g)) return refusal;
  const DeviceLimits limits = device_limits();
  if (limits.capability < 80) return "the GPU is older than compute capability 8.0";
  Lattice lattice = make_lattice(g, direction(pass), 0, g.K);
  // The larger the tile, the fewer points are loaded per target; a slot for every plane overlaps more copies.
  for (const int tile_z : {8, 4})
    for (const bool recycle : {false, true}) {
      set_tile(lattice, tile_z, recycle);
      // In 64 bits: dilations in z and y may reach far enough to overflow.
      const int64_t points = int64_t(planes(lattice)) * rows(lattice) * kPitch;
      if (points * (kPointBytes + kGateBytes) > (int64_t(1) << 30)) continue;
      const int bytes = shared_bytes(lattice, pass);
      if (bytes > limits.shared_bytes) continue;
      const int threads = pass == Pass::kGradWeight ? kWeightThreads : tile_z * kTileY * kTileX;
      const int by_threads = kMaxThreads / threads, by_shared = limits.shared_bytes / bytes;
      plan = {lattice, threads, bytes, limits.multiprocessors * (by_threads < by_shared ? by_threads : by_shared)};
      return nullptr;
    }
  return "the dilations reach too far for a tile to fit in the GPU's shared memory";
}

const char* fast_refusal(Pass pass, const Problem& g, DType dtype) {
  Plan plan;
  return make_plan(g, dtype, pass, plan);
}

Plan plan_all(const Inputs& in, Pass pass) {
  Plan plan;
  if (const char* refusal = make_plan(in.g, in.dtype, pass, plan))
    throw std::runtime_error(std::string("the fast tier does not take this pass: ") + refusal);
  return plan;
}

Plan plan_branch(const Inputs& in, Pass pass, int64_t k) {
  Plan plan = plan_all(in, pass);
  const bool recycle = plan.lattice.ring < planes(plan.lattice);
  const int tile_z = plan.lattice.tile_z;
  plan.lattice = make_lattice(in.g, direction(pass), k, 1);
  set_tile(plan.lattice, tile_z, recycle);
  plan.shared_bytes = shared_bytes(plan.lattice, pass);
  return plan;
}

// One thread a point: kCount channels of sample n, branch k, from channel chunk * kCount on.
template <int kCount>
__global__ __launch_bounds__(kPackThreads) void pack_points_kernel(Lattice g, Strided<const uint16_t> source,
                                                                   int branches, int64_t channels, int chunks,
                                                                   uint16_t* packed) {
  const int64_t index = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  const int64_t points = packed_points(g);
  if (index >= g.N * branches * chunks * points) return;
  const int64_t block = index / points, first = block % chunks * kCount;
  const int64_t k = block / chunks % branches, n = block / chunks / branches;
  int64_t place;
  const Index3 p = unpacked_position(g, index % points, place);
  const bool valid = inside(p, g.source);
  uint16_t values[kCount];
  const uint16_t* from = source.at(n, first, p) + k * source.k;
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = valid && first + i < channels ? from[i * source.c] : uint16_t(0);
  uint16_t* to = packed + (block * points + place) * kCount;
  // One store of 8 or 16 bytes.
  uint2 words[kCount / 4];
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i)
    words[i] = {values[4 * i] | uint32_t(values[4 * i + 1]) << 16, values[4 * i + 2] | uint32_t(values[4 * i + 3]) << 16};
  if constexpr (kCount == 8)
    *reinterpret_cast<uint4*>(to) = {words[0].x, words[0].y, words[1].x, words[1].y};
  else
    *reinterpret_cast<uint2*>(to) = words[0];
}

const unsigned char* pack_points(const Lattice& g, const TensorView& source, int64_t channels, int bytes,
                                 const Context& context) {
  const int count = bytes / 2;
  const int chunks = static_cast<int>(ceil_div(channels, count));
  const int branches = source.k == 0 ? 1 : g.K;
  const int64_t items = g.N * branches * chunks * packed_points(g);
  void* packed = context.scratch(items * bytes);
  launch("pack_points", count == 8 ? &pack_points_kernel<8> : &pack_points_kernel<4>, dim3(pack_blocks(items)),
         kPackThreads, 0, context.stream, g, Strided<const uint16_t>(source), branches, channels, chunks,
         static_cast<uint16_t*>(packed));
  return static_cast<const unsigned char*>(packed);
}

// One thread a lane of operand b: rows 2 i, 2 i + 1 of column lane / 4, with i = lane % 4, of the 8x8 halves, which are two
// taps of eight source channels. The adjoint swaps the weight's channels and counts the taps backwards.
__global__ __launch_bounds__(kPackThreads) void pack_blend_weight_kernel(Strided<const uint16_t> weight, int64_t sources,
                                                                         int64_t targets, bool adjoint, int chunks,
                                                                         int target_tiles, int64_t items, uint2* packed) {
  const int64_t index = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (index >= items) return;
  int64_t rest = index;
  const int lane = int(rest % 32);
  rest /= 32;
  const int tile = int(rest % target_tiles);
  rest /= target_tiles;
  const int step = int(rest % kPlanePairs);
  rest /= kPlanePairs;
  const int tz = int(rest % 3);
  rest /= 3;
  const int64_t source = rest % chunks * kChunk + lane % 4 * 2;
  const int64_t target = (rest / chunks * target_tiles + tile) * 8 + lane / 4;
  uint32_t halves[2];
  for (int half = 0; half < 2; ++half) {
    const int in_plane = 2 * step + half;
    const int tap = adjoint ? 26 - (tz * kPlaneTaps + in_plane) : tz * kPlaneTaps + in_plane;
    uint32_t pair = 0;
    for (int e = 0; e < 2; ++e)
      if (in_plane < kPlaneTaps && source + e < sources && target < targets) {
        const Index3 t = {tap / 9, tap / 3 % 3, tap % 3};
        const uint16_t value = adjoint ? *weight.at(source + e, target, t) : *weight.at(target, source + e, t);
        pair |= uint32_t(value) << (16 * e);
      }
    halves[half] = pair;
  }
  packed[index] = {halves[0], halves[1]};
}

const uint2* pack_blend_weight(const Inputs& in, bool adjoint, int target_tiles, const Context& context) {
  const int64_t sources = adjoint ? in.g.O : in.g.C, targets = adjoint ? in.g.C : in.g.O;
  const int chunks = num_chunks(sources);
  const int64_t items = ceil_div(targets, 8 * target_tiles) * chunks * 3 * kPlanePairs * target_tiles * 32;
  uint2* packed = static_cast<uint2*>(context.scratch(items * int64_t(sizeof(uint2))));
  launch("pack_blend_weight", &pack_blend_weight_kernel, dim3(pack_blocks(items)), kPackThreads, 0, context.stream,
         Strided<const uint16_t>(in.weight), sources, targets, adjoint, chunks, target_tiles, items, packed);
  return packed;
}

}  // namespace autofocus::cuda
