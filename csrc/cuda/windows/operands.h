// What the windows' passes read, packed: one launch and one piece of memory for all that the passes of a call have in
// common.
//
// A packed point is 16 bytes, the channels of a chunk side by side; the points of a sub-lattice lie next to each other.
// Source and target of the gather are packed alike, so the forward's target, read by the passes of the backward, is
// grad_input's source. Floats that are an operand of a product as they are packed are rounded to TF32 here.
#pragma once

#include "parts.h"
#include "staging.h"

namespace autofocus::cuda {

constexpr int kSlabTaps = 10;  // of one tz: nine taps, two a product, the last one with nothing

// Chunks of channels.
inline int num_chunks(int64_t channels, DType dtype) {
  return static_cast<int>(ceil_div(channels, kPointBytes / element_size(dtype)));
}

// Of a block of 8 kTiles target channels: the weight of one tz, and of a chunk.
template <int kTiles>
constexpr int kSlabBytes = kSlabTaps * 8 * kTiles * kPointBytes;
AUTOFOCUS_HD constexpr int chunk_weight_bytes(int tiles) { return 3 * kSlabTaps * 8 * tiles * kPointBytes; }

// Operands of some passes. First say what is wanted, then pack a part, then read where it is; the next part takes its
// place, and a weight stays.
class Operands {
 public:
  // `step` of the lattices of the passes, the same for all of a call.
  Operands(const Inputs& in, const Int3& step) : in_(in), step_(step) {}

  void want_input() { wants_input_ = true; }
  void want_attention() { wants_attention_ = true; }
  // [N, O, *S_out], or with a branch stride one for each branch; gated, each branch's is a_k G, rounded once.
  void want_grad_output(const TensorView& grad_output, bool gated) {
    grad_output_ = grad_output;
    gates_grad_output_ = gated;
  }
  // Operand b of the forward's branches, `tiles` wide; of grad_input, with the branch scale multiplied in and rounded
  // once.
  void want_weight(int tiles) { weight_tiles_ = tiles; }
  void want_adjoint_weight(int tiles) { adjoint_tiles_ = tiles; }
  // Memory beside them.
  void want_scratch(int64_t bytes) { scratch_bytes_ = bytes; }

  // Bytes of memory for any part.
  int64_t bytes(const Split& split);
  void pack(const Part& part, void* memory, const Context& context) { pack(part, memory, &context); }

  // [N, chunks, points]
  const unsigned char* input() const { return at(input_at_); }
  // [N, chunks, target points], or by branch [N, K, chunks, target points]
  const unsigned char* grad_output() const { return at(grad_output_at_); }
  // [N, target points], kLatticeBranches elements each
  const unsigned char* attention() const { return at(attention_at_); }
  // [blocks of 8 tiles output channels, chunks, tz, kSlabTaps, 8 tiles] points of input channels
  const unsigned char* weight() const { return at(weight_at_); }
  // The same with the channels exchanged and the taps counted backwards; with a branch scale [blocks, chunks, K, tz,
  // ...]
  const unsigned char* adjoint_weight() const { return at(adjoint_at_); }
  void* scratch() const { return at(scratch_at_); }

 private:
  // Lays out what a part takes, and packs it unless there is no memory yet.
  int64_t pack(const Part& part, void* memory, const Context* context);
  unsigned char* at(int64_t offset) const { return memory_ + offset; }

  const Inputs& in_;
  Int3 step_;
  bool wants_input_ = false, wants_attention_ = false, gates_grad_output_ = false;
  TensorView grad_output_{};
  int weight_tiles_ = 0, adjoint_tiles_ = 0;
  int64_t scratch_bytes_ = 0;
  int64_t input_at_ = 0, grad_output_at_ = 0, attention_at_ = 0, weight_at_ = 0, adjoint_at_ = 0, scratch_at_ = 0;
  unsigned char* memory_ = nullptr;  // of the last part packed
};

}  // namespace autofocus::cuda
