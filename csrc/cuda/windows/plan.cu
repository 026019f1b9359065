// What the windows' passes take, tile sizes, and the packing of their operands.
#include "plan.h"

namespace autofocus::cuda {

namespace {

constexpr int kPackThreads = 256;
constexpr int kWidths[] = {8, 5, 4, 2};  // tiles of eight target channels, as for_tiles has them

unsigned int pack_blocks(int64_t items) { return static_cast<unsigned int>(ceil_div(items, kPackThreads)); }

Direction direction(Pass pass) {
  return pass == Pass::kGradInput ? Direction::kAdjoint : Direction::kForward;
}

// Behind the pipeline's own; the kernels say what for.
int more_bytes(Pass pass, const Lattice& g, int tiles) {
  const int gates = g.tile_z * kTileY * kTileX * kGateBytes, vectors = kLatticeBranches * 8 * tiles * int(sizeof(float));
  switch (pass) {
    case Pass::kForward: return chunk_weight_bytes(tiles) + gates + 2 * vectors;
    case Pass::kGradAttention: return chunk_weight_bytes(tiles) + 2 * vectors;
    case Pass::kGradWeight: return gates;
    default: return chunk_weight_bytes(tiles);
  }
}

int shared_bytes(Pass pass, const Lattice& g, int tiles) {
  return g.ring * plane_size(g) * kPointBytes + 2 * int(sizeof(Tile)) + more_bytes(pass, g, tiles);
}

}  // namespace

const char* make_plan(Pass pass, const Problem& g, DType dtype, Plan& plan) {
  if (dtype != DType::kFloat16 && dtype != DType::kBFloat16) return "the dtype is not float16 or bfloat16";
  if (const char* refusal = lattice_refusal(g)) return refusal;
  const DeviceLimits limits = device_limits();
  if (limits.capability < 80) return "the GPU is older than compute capability 8.0";
  Lattice lattice = make_lattice(g, direction(pass), 0, g.K);
  // Blocks of channels, all alike. Without warpgroup MMA, whose operands are in no register, more than 40 cost spills.
  const int64_t targets = direction(pass) == Direction::kForward ? g.O : g.C, most = limits.capability == 90 ? 64 : 40;
  const int64_t wanted = ceil_div(ceil_div(targets, ceil_div(targets, most)), 8);
  // The larger the tile, the fewer points are loaded per target; a slot for every plane overlaps more of the writing; the
  // more channels at once, the fewer times a tile is gone through.
  for (const int tile_z : {8, 4}) {
    // Half of it would be empty.
    if (tile_z == 8 && lattice.target_points.z <= 4) continue;
    for (const bool recycle : {false, true})
      for (int width = 0; width < 4; ++width) {
        // The narrowest width that holds what is wanted, and narrower ones if that does not fit.
        if (width + 1 < 4 && kWidths[width + 1] >= wanted) continue;
        set_tile(lattice, tile_z, recycle);
        // In 64 bits: dilations in z and y may reach far enough to overflow.
        const int64_t points = int64_t(planes(lattice)) * rows(lattice) * kPitch;
        if (points * kPointBytes > (int64_t(1) << 30)) continue;
        const int bytes = shared_bytes(pass, lattice, kWidths[width]);
        if (bytes > limits.shared_bytes) continue;
        const int threads = tile_z / kGroupPlanes * kGroupThreads;
        const int by_threads = kMaxThreads / threads, by_shared = limits.shared_bytes / bytes;
        plan = {lattice, kWidths[width], threads, bytes,
                limits.multiprocessors * (by_threads < by_shared ? by_threads : by_shared)};
        return nullptr;
      }
  }
  return "the dilations reach too far for a tile to fit in the GPU's shared memory";
}

const char* fast_refusal(Pass pass, const Problem& g, DType dtype) {
  Plan plan;
  return make_plan(pass, g, dtype, plan);
}

Plan plan_of(Pass pass, const Inputs& in) {
  Plan plan;
  if (const char* refusal = make_plan(pass, in.g, in.dtype, plan))
    throw std::runtime_error(std::string("the fast tier does not take this pass: ") + refusal);
  return plan;
}

Plan plan_of_branch(Pass pass, const Inputs& in, int64_t k) {
  Plan plan = plan_of(pass, in);
  const bool recycle = plan.lattice.ring < planes(plan.lattice);
  const int tile_z = plan.lattice.tile_z;
  plan.lattice = make_lattice(in.g, direction(pass), k, 1);
  set_tile(plan.lattice, tile_z, recycle);
  plan.shared_bytes = shared_bytes(pass, plan.lattice, plan.tiles);
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

// One thread a point.
template <typename T>
__global__ __launch_bounds__(kPackThreads) void pack_scaled_grads_kernel(Lattice g, Strided<const T> grad_output,
                                                                         Strided<const T> attention, Strided<const T> scale,
                                                                         int64_t channels, int chunks, uint4* packed) {
  const int64_t index = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  const int64_t points = packed_points(g);
  if (index >= g.N * g.K * chunks * points) return;
  const int64_t block = index / points, first = block % chunks * kChunk;
  const int64_t k = block / chunks % g.K, n = block / chunks / g.K;
  int64_t place;
  const Index3 p = unpacked_position(g, index % points, place);
  const bool valid = inside(p, g.source);
  const float a = valid ? to_float(*attention.at(n, k, p)) : 0.0f;
  const T* from = grad_output.at(n, first, p);
  float values[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const bool there = valid && first + i < channels;
    values[i] = there ? a * branch_value(scale, k, first + i) * to_float(from[i * grad_output.c]) : 0.0f;
  }
  packed[block * points + place] = {pack(values[0], values[1], T{}), pack(values[2], values[3], T{}),
                                    pack(values[4], values[5], T{}), pack(values[6], values[7], T{})};
}

const unsigned char* pack_scaled_grads(const Lattice& g, const Inputs& in, const TensorView& grad_output,
                                       const Context& context) {
  const int chunks = num_chunks(in.g.O);
  const int64_t items = g.N * g.K * chunks * packed_points(g);
  uint4* packed = static_cast<uint4*>(context.scratch(items * kPointBytes));
  for_16_bit(in.dtype, [&](auto element) {
    using T = decltype(element);
    launch("pack_scaled_grads", &pack_scaled_grads_kernel<T>, dim3(pack_blocks(items)), kPackThreads, 0, context.stream, g,
           Strided<const T>(grad_output), Strided<const T>(in.attention), Strided<const T>(in.scale), in.g.O, chunks, packed);
  });
  return reinterpret_cast<const unsigned char*>(packed);
}

// One thread a point. The adjoint swaps the weight's channels and counts the taps backwards.
__global__ __launch_bounds__(kPackThreads) void pack_weight_kernel(Strided<const uint16_t> weight, Int3 kernel, int64_t sources,
                                                                   int64_t targets, bool adjoint, int chunks,
                                                                   int block_targets, int64_t items, uint4* packed) {
  const int64_t index = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (index >= items) return;
  int64_t rest = index;
  const int in_block = int(rest % block_targets);
  rest /= block_targets;
  const int in_slab = int(rest % kSlabTaps);
  rest /= kSlabTaps;
  const int tz = int(rest % 3);
  rest /= 3;
  const int64_t source = rest % chunks * kChunk, target = rest / chunks * block_targets + in_block;
  // On an axis of one tap those beside it are zero.
  const int sign = adjoint ? -1 : 1;
  const Index3 t = {kernel.z / 2 + sign * (tz - 1), kernel.y / 2 + sign * (in_slab / 3 - 1),
                    kernel.x / 2 + sign * (in_slab % 3 - 1)};
  uint32_t words[kChunk / 2] = {};
  if (target < targets && in_slab < kPlaneTaps && inside(t, {kernel.z, kernel.y, kernel.x}))
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (source + i < sources) {
        const uint16_t value = adjoint ? *weight.at(source + i, target, t) : *weight.at(target, source + i, t);
        words[i / 2] |= uint32_t(value) << (16 * (i % 2));
      }
  packed[index] = {words[0], words[1], words[2], words[3]};
}

const unsigned char* pack_weight(const Inputs& in, Direction direction, int tiles, const Context& context) {
  const Problem& g = in.g;
  const bool adjoint = direction == Direction::kAdjoint;
  const int64_t sources = adjoint ? g.O : g.C, targets = adjoint ? g.C : g.O;
  const int chunks = num_chunks(sources);
  const int64_t items = ceil_div(targets, 8 * tiles) * chunks * (chunk_weight_bytes(tiles) / kPointBytes);
  uint4* packed = static_cast<uint4*>(context.scratch(items * kPointBytes));
  launch("pack_weight", &pack_weight_kernel, dim3(pack_blocks(items)), kPackThreads, 0, context.stream,
         Strided<const uint16_t>(in.weight), Int3{int(g.kernel.z), int(g.kernel.y), int(g.kernel.x)}, sources, targets,
         adjoint, chunks, 8 * tiles, items, packed);
  return reinterpret_cast<const unsigned char*>(packed);
}

}  // namespace autofocus::cuda
