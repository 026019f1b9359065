// Chooses the plans of plan.h, and which passes the fast tier refuses.
#include "plan.h"

namespace autofocus::cuda {

namespace {

constexpr int kWidths[] = {8, 5, 4, 2};  // eights of target channels, as for_tiles has them

constexpr int64_t kMaxChannels = 4 * 65535;  // chunks, of at least four channels, are a grid dimension of at most 65535
constexpr int kBlockReserve = 1024;          // bytes of shared memory that the GPU keeps for itself in each block

Direction direction(Pass pass) { return pass == Pass::kGradInput ? Direction::kAdjoint : Direction::kForward; }

// Shared memory that the kernel of a pass uses behind the pipeline's own: the weight of a chunk, the gates of a tile,
// branch scale and shift.
int more_bytes(Pass pass, const Lattice& lattice, DType dtype, int tiles) {
  const int gates = lattice.tile_z * kTileY * kTileX * kLatticeBranches * int(element_size(dtype)),
            vectors = kLatticeBranches * 8 * tiles * int(sizeof(float));
  switch (pass) {
    case Pass::kForward: return chunk_weight_bytes(tiles) + gates + 2 * vectors;
    case Pass::kGradAttention: return chunk_weight_bytes(tiles) + 2 * vectors;
    case Pass::kGradWeight: return gates;
    default: return chunk_weight_bytes(tiles);
  }
}

int shared_bytes(Pass pass, const Lattice& lattice, DType dtype, int tiles) {
  return pipeline_bytes(lattice) + more_bytes(pass, lattice, dtype, tiles);
}

}  // namespace

const char* make_plan(Pass pass, const Problem& g, DType dtype, Plan& plan) {
  if (const char* refusal = lattice_refusal(g)) return refusal;
  const DeviceLimits limits = device_limits();
  if (limits.capability < 80) return "the GPU is older than compute capability 8.0";
  if (g.C > kMaxChannels || g.O > kMaxChannels) return "there are too many channels for the grid of a launch";
  Lattice lattice = make_lattice(g, direction(pass), 0, g.K);
  // Sample, branch, chunk and class together are one coordinate of a bulk copy, an int.
  if (g.N * g.K * num_chunks(g.C > g.O ? g.C : g.O, dtype) * volume(lattice.step) > INT32_MAX)
    return "there are too many samples and channels for 32-bit numbers of packed volumes";
  // Equal blocks of target channels, of at most 64. More than 40 would spill registers without warpgroup MMA (which
  // keeps operands out of registers), and where a kernel holds G as floats beside its sums.
  const bool holds_floats = pass == Pass::kGradAttention && dtype == DType::kFloat32;
  const int64_t targets = direction(pass) == Direction::kForward ? g.O : g.C,
                most = limits.capability == 90 && !holds_floats ? 64 : 8 * kNarrowTiles;
  const int64_t wanted = ceil_div(ceil_div(targets, ceil_div(targets, most)), 8);
  // The first choice that fits, best first. A larger tile loads fewer points per target; a slot for every plane hides
  // more of the copying; with more channels at once, a tile is gone through fewer times.
  for (const int tile_z : {8, 4}) {
    if (tile_z == 8 && lattice.target_points.z <= 4) continue;  // half of the tile would be empty
    for (const bool slot_for_every_plane : {true, false})
      for (int width = 0; width < 4; ++width) {
        // Begins with the narrowest width that holds all wanted channels.
        if (width + 1 < 4 && kWidths[width + 1] >= wanted) continue;
        set_tile(lattice, tile_z);
        // In 64 bits, because large dilations in z would overflow an int.
        const int64_t points = int64_t(planes(lattice)) * lattice.plane_points;
        if (points * kPointBytes > (int64_t(1) << 30)) continue;
        set_ring(lattice, slot_for_every_plane ? planes(lattice) : fewest_planes(lattice));
        int bytes = shared_bytes(pass, lattice, dtype, kWidths[width]);
        if (bytes > limits.shared_bytes) continue;
        const bool is_grad_weight = pass == Pass::kGradWeight;
        const int threads = is_grad_weight ? kGradWeightThreads : tile_z / kGroupPlanes * kGroupThreads;
        const int by_registers = is_grad_weight ? 1 : kMaxThreads / threads,
                  by_shared = (limits.shared_bytes + kBlockReserve) / (bytes + kBlockReserve);
        const int blocks = by_registers < by_shared ? by_registers : by_shared;
        // The shared memory that this many blocks leave is used for more slots.
        const int left = (limits.shared_bytes + kBlockReserve) / blocks - kBlockReserve - bytes;
        set_ring(lattice, lattice.ring + left / (lattice.plane_points * kPointBytes));
        bytes = shared_bytes(pass, lattice, dtype, kWidths[width]);
        set_threads(lattice, threads);
        plan = {lattice, kWidths[width], threads, bytes, limits.multiprocessors, limits.multiprocessors * blocks};
        return nullptr;
      }
  }
  return "the dilations reach too far for a tile to fit in the GPU's shared memory";
}

namespace {

Problem problem_of_slice(const Problem& g, int64_t first, int64_t most = kLatticeBranches) {
  return branches_problem(g, first, g.K - first < most ? g.K - first : most);
}

}  // namespace

Inputs slice_of(const Inputs& in, int64_t first, int64_t most) {
  Inputs slice = in;
  slice.g = problem_of_slice(in.g, first, most);
  slice.attention = advanced(in.attention, first * in.attention.c, in.dtype);
  slice.scale = advanced(in.scale, first * in.scale.n, in.dtype);
  slice.shift = advanced(in.shift, first * in.shift.n, in.dtype);
  return slice;
}

const char* fast_refusal(Pass pass, const Problem& g, DType dtype, bool tf32) {
  if (dtype == DType::kFloat64) return "the dtype is float64";
  if (dtype == DType::kFloat32 && !tf32) return "the dtype is float32 and TF32 is not allowed";
  for (int64_t first = 0; first < g.K; first += kLatticeBranches) {
    Plan plan;
    if (const char* refusal = make_plan(pass, problem_of_slice(g, first), dtype, plan)) return refusal;
  }
  return nullptr;
}

Plan plan_of(Pass pass, const Inputs& in) {
  Plan plan;
  if (const char* refusal = make_plan(pass, in.g, in.dtype, plan))
    throw std::runtime_error(std::string("the fast tier does not take this pass: ") + refusal);
  if (in.few_blocks && plan.multiprocessors > kFewMultiprocessors) {
    plan.blocks = plan.blocks / plan.multiprocessors * kFewMultiprocessors;
    plan.multiprocessors = kFewMultiprocessors;
  }
  return plan;
}

Plan plan_of_part(Plan plan, Pass pass, const Part& part) {
  restrict_to(plan.lattice, part, direction(pass));
  return plan;
}

Plan plan_of_branches(Pass pass, const Inputs& in, int64_t first, int64_t count) {
  Plan plan = plan_of(pass, in);
  const int tile_z = plan.lattice.tile_z, room = plan.lattice.ring_bytes;
  plan.lattice = make_lattice(in.g, direction(pass), first, count);
  set_tile(plan.lattice, tile_z);
  set_ring(plan.lattice, room / (plan.lattice.plane_points * kPointBytes));
  set_threads(plan.lattice, plan.threads);
  plan.shared_bytes = shared_bytes(pass, plan.lattice, in.dtype, plan.tiles);
  return plan;
}

Plan plan_of_branch(Pass pass, const Inputs& in, const Part& part, int64_t k) {
  return plan_of_part(plan_of_branches(pass, in, k, 1), pass, part);
}

namespace {

Work work_on(int blocks, const Plan& plan, int64_t target_blocks) {
  const int64_t tiles = num_tiles(plan.lattice), wanted = ceil_div(blocks, target_blocks);
  return {tiles, wanted < tiles ? wanted : tiles};
}

}  // namespace

Work work_of(const Plan& plan, int64_t target_blocks) { return work_on(plan.blocks, plan, target_blocks); }

Work work_of_multiprocessors(const Plan& plan, int64_t target_blocks) {
  return work_on(plan.multiprocessors, plan, target_blocks);
}

}  // namespace autofocus::cuda
