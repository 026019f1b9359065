// Packed operands: what the passes of the fast tier read. One launch packs everything that some passes have in common
// for one part, into one piece of scratch memory.
//
// A packed point is 16 bytes, the channels of one chunk; the points of a class lie next to each other. Output and input
// are packed alike, so one packed grad_output can be the target of grad_attention and grad_weight and the source of
// grad_input. Floats that a product reads as they are packed are rounded to TF32 here.
#pragma once

#include "parts.h"
#include "staging.h"

namespace autofocus::cuda {

constexpr int kSlabTaps = 10;  // taps of a slab: nine of one tz and one of zeros, since a product takes two

// How many chunks these channels take; the last one is filled up with zeros.
inline int num_chunks(int64_t channels, DType dtype) {
  return static_cast<int>(ceil_div(channels, kPointBytes / element_size(dtype)));
}

// Bytes of the weight of a block of 8 kTiles target channels and one chunk: of one tz (a slab), and of all three.
template <int kTiles>
constexpr int kSlabBytes = kSlabTaps * 8 * kTiles * kPointBytes;
AUTOFOCUS_HD constexpr int chunk_weight_bytes(int tiles) { return 3 * kSlabTaps * 8 * tiles * kPointBytes; }

// The operands of some passes. The caller first says what it wants, allocates bytes(), then packs one part after the
// other and runs the passes on it. A part overwrites the part before; weights stay.
class Operands {
 public:
  // `all`: the problem whose lattices and parts the passes have; `in` may be some of its branches. Both must outlive
  // this object.
  Operands(const Inputs& in, const Problem& all) : in_(in), all_(all) {}

  void want_input() { wants_input_ = true; }
  void want_attention() { wants_attention_ = true; }
  // grad_output [N, O, *S_out], or with a branch stride one for each branch. If `gated`, a_k G is packed for each
  // branch instead, rounded once.
  void want_grad_output(const TensorView& grad_output, bool gated) {
    grad_output_ = grad_output;
    gates_grad_output_ = gated;
  }
  // The weight as operand b, for blocks of 8 `tiles` target channels: that of branches_kernel, and that of grad_input,
  // which has the branch scale multiplied in and is rounded once.
  void want_weight(int tiles) { weight_tiles_ = tiles; }
  void want_adjoint_weight(int tiles) { adjoint_tiles_ = tiles; }
  // Scratch memory for the passes, in the same allocation. It keeps its contents from part to part.
  void want_scratch(int64_t bytes) { scratch_bytes_ = bytes; }

  // Bytes that are enough for every part of a split.
  int64_t bytes(const Split& split);
  void pack(const Part& part, void* memory, const Context& context) { pack(part, memory, &context); }

  // Where the last part packed lies. N counts its samples; points are those of its classes and planes.
  // Points [N, chunks, input points].
  const unsigned char* input() const { return at(input_at_); }
  // Points [N, chunks, output points], or [N, K, chunks, output points] if there is one for each branch.
  const unsigned char* grad_output() const { return at(grad_output_at_); }
  // Gates [N, output points] of kLatticeBranches elements.
  const unsigned char* attention() const { return at(attention_at_); }
  // Points of input channels [blocks of 8 tiles output channels, chunks, tz, kSlabTaps, 8 tiles].
  const unsigned char* weight() const { return at(weight_at_); }
  // The same with input and output channels exchanged and the taps counted backwards. With a branch scale one for each
  // branch: [blocks, chunks, K, tz, ...].
  const unsigned char* adjoint_weight() const { return at(adjoint_at_); }
  void* scratch() const { return at(scratch_at_); }

 private:
  // Lays out the operands of a part, packs them unless `memory` is null, and returns their bytes.
  int64_t pack(const Part& part, void* memory, const Context* context);
  unsigned char* at(int64_t offset) const { return memory_ + offset; }

  const Inputs& in_;
  const Problem& all_;
  bool wants_input_ = false, wants_attention_ = false, gates_grad_output_ = false;
  TensorView grad_output_{};
  int weight_tiles_ = 0, adjoint_tiles_ = 0;  // 0: not wanted
  int64_t scratch_bytes_ = 0;
  // Offsets in memory_, in bytes.
  int64_t input_at_ = 0, grad_output_at_ = 0, attention_at_ = 0, weight_at_ = 0, adjoint_at_ = 0, scratch_at_ = 0;
  unsigned char* memory_ = nullptr;  // where the last part was packed; null before the first
};

}  // namespace autofocus::cuda
