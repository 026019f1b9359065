// The packing kernel and its jobs (operands.h). It is launched once for every part, before the passes that share it.
//
// One launch does all jobs of a part, each in thread blocks of its own; a thread packs a few chunks of one position.
// Packing should be bound by memory. So a thread does little else: it finds its position once, in 32 bits, and loads
// whole points at once where the tensor's layout allows it.
#include "operands.h"

namespace autofocus::cuda {

namespace {

constexpr int kPackThreads = 256;
constexpr int kPackChunks = 4;       // chunks that a thread packs
constexpr int64_t kAlignment = 256;  // bytes, of every operand; torch's allocator aligns the first one at least so

// The bits of an element: packing mostly moves them as they are.
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

// A job: packs a volume as [N, branches, chunks, points] of kCount channels each, multiplied by the gates of each
// branch if there are any.
template <typename T>
struct PackPoints {
  unsigned int blocks;             // thread blocks of this job; 0 if it is not wanted
  int position_blocks, groups;     // thread blocks for all positions of a sample; groups of kPackChunks chunks
  int aligned;                     // alignment_of the source, in bytes
  bool rounds;                     // floats to TF32
  Strided<const Bits<T>> source;   // with branch stride 0 the same for all branches
  Strided<const T> gates;          // null: none
  int branches, channels, chunks;  // chunks: of one branch
  Int3 step, points;               // points of a class and this part
  int first_plane;                 // of the part, in each class
  Classes classes;
  Index3 size;  // of the volume; positions outside become zeros
  void* packed;
};

// A job: packs the weight as operand b, in the layout of Operands::weight or adjoint_weight.
struct PackWeight {
  unsigned int blocks;  // thread blocks of this job; 0 if it is not wanted
  bool adjoint;
  int64_t sources, targets;         // channels: C and O, or O and C in the adjoint
  int64_t chunks, branches, items;  // chunks of sources; weights for each chunk; points in all, one a thread
  int block_targets;                // target channels of a block
  uint4* packed;
};

// All jobs of a launch, whose thread blocks are numbered in this order.
template <typename T>
struct Packing {
  PackPoints<T> input, grad_output, attention;
  PackWeight weight, adjoint_weight;
  Strided<const T> weight_values, scale;
  Index3 kernel;
};

// A word of a point (a float, or two 16-bit elements) times a gate, each element rounded once.
template <typename T>
__device__ inline uint32_t gated(uint32_t word, T gate) {
  if constexpr (std::is_same_v<T, float>) {
    return tf32(float_of(word) * gate);
  } else {
    uint16_t bits;
    memcpy(&bits, &gate, sizeof(bits));
    return multiply(word, bits * 0x10001u, T{});
  }
}

// Loads a point of kWords words. Only its first `channels` channels exist (maybe none, maybe all), the others are zero.
template <int kWords, typename T>
__device__ inline void load_point(const PackPoints<T>& job, const Bits<T>* from, int channels,
                                  uint32_t (&words)[kWords]) {
  constexpr int kInWord = 4 / int(sizeof(T));
  if (job.aligned >= 4 * kWords && channels >= kInWord * kWords) {
    if constexpr (kWords == 4) {
      const uint4 point = *reinterpret_cast<const uint4*>(from);
      words[0] = point.x, words[1] = point.y, words[2] = point.z, words[3] = point.w;
    } else {
      const uint2 point = *reinterpret_cast<const uint2*>(from);
      words[0] = point.x, words[1] = point.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = 0;
      if (job.aligned >= 4 && channels >= kInWord * (i + 1))
        words[i] = *reinterpret_cast<const uint32_t*>(from + kInWord * i);
      else
#pragma unroll
        for (int j = 0; j < kInWord; ++j) {
          const int channel = kInWord * i + j;
          if (channel < channels) words[i] |= uint32_t(from[channel * job.source.c]) << (16 * j);
        }
    }
  }
  if constexpr (std::is_same_v<T, float>)
    if (job.rounds)
#pragma unroll
      for (uint32_t& word : words) word = tf32(float_of(word));
}

// kCount: channels of a packed point, or branches of packed gates. `block`: the number of this thread block in the job.
template <int kCount, typename T>
__device__ inline void pack_points(const PackPoints<T>& job, unsigned int block) {
  constexpr int kWords = kCount * int(sizeof(T)) / 4;
  using Packed = std::conditional_t<kWords == 4, uint4, uint2>;  // one store
  uint32_t rest = block;
  const int index = take_remainder(rest, job.position_blocks) * kPackThreads + int(threadIdx.x);
  const int first = take_remainder(rest, job.groups) * kPackChunks;
  const int64_t n = rest, all = volume(job.points) * volume(job.classes.count);
  if (index >= all) return;
  int place;
  const Index3 p = unpacked_position(job.points, job.first_plane, job.step, job.classes, index, place);
  const int channels = inside(p, job.size) ? job.channels - first * kCount : 0;
  const Bits<T>* from = job.source.at(n, int64_t(first) * kCount, p);
  Packed* to = static_cast<Packed*>(job.packed) + (n * job.branches * job.chunks + first) * all + place;
  uint32_t words[kPackChunks][kWords];
#pragma unroll 1
  for (int k = 0; k < job.branches; ++k, to += job.chunks * all) {
    if (k == 0 || job.source.k != 0)
#pragma unroll
      for (int i = 0; i < kPackChunks; ++i)
        load_point(job, from + k * job.source.k + i * kCount * job.source.c, channels - i * kCount, words[i]);
    const T gate = job.gates.data != nullptr && channels > 0 ? *job.gates.at(n, k, p) : T{};
#pragma unroll
    for (int i = 0; i < kPackChunks; ++i) {
      if (first + i >= job.chunks) break;
      Packed point;
      uint32_t out[kWords];
#pragma unroll
      for (int word = 0; word < kWords; ++word)
        out[word] = job.gates.data != nullptr ? gated(words[i][word], gate) : words[i][word];
      memcpy(&point, out, sizeof(point));
      to[i * all] = point;
    }
  }
}

// A packed point of these elements, each rounded once (floats to TF32).
template <typename T>
__device__ inline uint4 packed_point(const float (&values)[kChunk<T>]) {
  if constexpr (std::is_same_v<T, float>)
    return {tf32(values[0]), tf32(values[1]), tf32(values[2]), tf32(values[3])};
  else
    return {pack(values[0], values[1], T{}), pack(values[2], values[3], T{}), pack(values[4], values[5], T{}),
            pack(values[6], values[7], T{})};
}

template <typename T>
__device__ inline void pack_weight(const PackWeight& job, const Packing<T>& packing, unsigned int block) {
  const int64_t index = int64_t(block) * kPackThreads + threadIdx.x;
  if (index >= job.items) return;
  int64_t rest = index;
  const int in_block = int(rest % job.block_targets);
  rest /= job.block_targets;
  const int in_slab = int(rest % kSlabTaps);
  rest /= kSlabTaps;
  const int tz = int(rest % 3);
  rest /= 3;
  const int64_t k = rest % job.branches;
  rest /= job.branches;
  const int64_t source = rest % job.chunks * kChunk<T>, target = rest / job.chunks * job.block_targets + in_block;
  // What lies outside the kernel is zero: on an axis with one tap the taps beside it, and the tenth tap of a slab,
  // whose row is behind the last one.
  const Index3& kernel = packing.kernel;
  const int sign = job.adjoint ? -1 : 1;
  const Index3 t = {kernel.z / 2 + sign * (tz - 1), kernel.y / 2 + sign * (in_slab / 3 - 1),
                    kernel.x / 2 + sign * (in_slab % 3 - 1)};
  const bool there = target < job.targets && inside(t, kernel);
  float values[kChunk<T>];
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) {
    const int64_t o = job.adjoint ? source + i : target, c = job.adjoint ? target : source + i;
    values[i] = 0.0f;
    if (!there || source + i >= job.sources) continue;
    values[i] = to_float(*packing.weight_values.at(o, c, t));
    if (job.adjoint && packing.scale.data != nullptr) values[i] *= branch_value(packing.scale, k, o);
  }
  job.packed[index] = packed_point<T>(values);
}

// Whether this thread block belongs to the job. If not, makes `block` its number among those of the jobs that follow.
template <typename Job>
__device__ inline bool takes(const Job& job, unsigned int& block) {
  if (block < job.blocks) return true;
  block -= job.blocks;
  return false;
}

template <typename T>
__global__ __launch_bounds__(kPackThreads) void pack_kernel(const __grid_constant__ Packing<T> packing) {
  unsigned int block = blockIdx.x;
  const bool is_input = takes(packing.input, block);
  if (is_input || takes(packing.grad_output, block))
    return pack_points<kChunk<T>>(is_input ? packing.input : packing.grad_output, block);
  if (takes(packing.attention, block)) return pack_points<kLatticeBranches>(packing.attention, block);
  if (takes(packing.weight, block)) return pack_weight(packing.weight, packing, block);
  pack_weight(packing.adjoint_weight, packing, block);
}

}  // namespace

int64_t Operands::bytes(const Split& split) {
  int64_t most = 0;
  // Parts differ in size only by their slabs, and slabs vary fastest.
  for (int64_t slab = 0; slab < split.slabs; ++slab) {
    const int64_t own = pack(part_of(all_, split, slab), nullptr, nullptr);
    most = own > most ? own : most;
  }
  return most;
}

int64_t Operands::pack(const Part& part, void* memory, const Context* context) {
  const Problem& g = in_.g;
  const Int3 step = common_step(all_);
  int64_t bytes = 0, blocks = 0;
  const auto place = [&](int64_t size) {
    const int64_t at = bytes;
    bytes += ceil_div(size, kAlignment) * kAlignment;
    return at;
  };
  const auto take_blocks = [&](int64_t count) {
    blocks += count;
    return static_cast<unsigned int>(count);
  };
  const auto weight = [&](bool adjoint, int tiles, int64_t& at) {
    const int64_t sources = adjoint ? g.O : g.C, targets = adjoint ? g.C : g.O;
    const int64_t chunks = num_chunks(sources, in_.dtype), branches = adjoint && in_.scale.data != nullptr ? g.K : 1;
    const int64_t items = ceil_div(targets, 8 * tiles) * chunks * branches * (chunk_weight_bytes(tiles) / kPointBytes);
    at = place(items * kPointBytes);
    return PackWeight{take_blocks(ceil_div(items, kPackThreads)),
                      adjoint,
                      sources,
                      targets,
                      chunks,
                      branches,
                      items,
                      8 * tiles,
                      nullptr};
  };
  for_matrix_dtype(in_.dtype, [&](auto element) {
    using T = decltype(element);
    const TensorView none{};
    const auto first_of_part = [&](const TensorView& tensor) {
      return advanced(tensor, part.first_sample * tensor.n, in_.dtype);
    };
    const auto points = [&](const TensorView& source, const TensorView& gates, int64_t channels, int count,
                            const Index3& size, const Classes& classes, const Slab& planes, bool rounds, int64_t& at) {
      const int64_t branches = source.k == 0 && gates.data == nullptr ? 1 : g.K, chunks = ceil_div(channels, count);
      Int3 class_points = lattice_points(size, step);
      class_points.z = planes.count;
      const int64_t all = volume(classes.count) * volume(class_points);
      const int64_t position_blocks = ceil_div(all, kPackThreads), groups = ceil_div(chunks, kPackChunks);
      const TensorView own = first_of_part(source);
      at = place(part.samples * branches * chunks * all * count * int64_t(sizeof(T)));
      return PackPoints<T>{take_blocks(part.samples * groups * position_blocks),
                           int(position_blocks),
                           int(groups),
                           alignment_of(own, int(sizeof(T))),
                           rounds,
                           Strided<const Bits<T>>(own),
                           Strided<const T>(first_of_part(gates)),
                           int(branches),
                           int(channels),
                           int(chunks),
                           step,
                           class_points,
                           planes.first,
                           classes,
                           size,
                           nullptr};
    };
    const PackPoints<T> no_points{
        0, 1, 1, 1, false, Strided<const Bits<T>>(none), Strided<const T>(none), 0, 0, 0, {}, {}, 0, {}, {}, nullptr};
    const PackWeight no_weight{0, false, 0, 0, 0, 0, 0, 1, nullptr};
    Packing<T> packing{no_points,
                       no_points,
                       no_points,
                       no_weight,
                       no_weight,
                       Strided<const T>(in_.weight),
                       Strided<const T>(in_.scale),
                       g.kernel};
    // First what stays from part to part, then what each part brings: its size may change.
    scratch_at_ = place(scratch_bytes_);
    if (weight_tiles_ > 0) packing.weight = weight(false, weight_tiles_, weight_at_);
    if (adjoint_tiles_ > 0) packing.adjoint_weight = weight(true, adjoint_tiles_, adjoint_at_);
    // TF32: rounded here is what products read as it is. The attention, and a G that is multiplied by it, are rounded
    // when that product is formed.
    if (wants_input_)
      packing.input = points(in_.input, none, g.C, kChunk<T>, g.input, part.input, part.input_planes, true, input_at_);
    if (grad_output_.data != nullptr)
      packing.grad_output = points(grad_output_, gates_grad_output_ ? in_.attention : none, g.O, kChunk<T>, g.output,
                                   part.output, part.output_planes, grad_output_.k != 0, grad_output_at_);
    if (wants_attention_)
      packing.attention = points(in_.attention, none, g.K, kLatticeBranches, g.output, part.output, part.output_planes,
                                 false, attention_at_);
    if (memory == nullptr) return;
    if (memory == memory_)  // the weights are there already: launch no blocks for them, whose numbers are the last
      blocks -= packing.weight.blocks + packing.adjoint_weight.blocks;
    memory_ = static_cast<unsigned char*>(memory);
    packing.input.packed = at(input_at_);
    packing.grad_output.packed = at(grad_output_at_);
    packing.attention.packed = at(attention_at_);
    packing.weight.packed = reinterpret_cast<uint4*>(at(weight_at_));
    packing.adjoint_weight.packed = reinterpret_cast<uint4*>(at(adjoint_at_));
    launch("pack", &pack_kernel<T>, dim3(static_cast<unsigned int>(blocks)), kPackThreads, 0, context->stream, packing);
  });
  return bytes;
}

}  // namespace autofocus::cuda
