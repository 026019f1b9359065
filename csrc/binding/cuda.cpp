// torch.ops.autofocus_cuda: device, stream and scratch memory of a call, and the tier of every pass.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "../cuda/kernels.h"
#include "operators.h"

// The tests build this file for CPU tensors, over the emulation of tests/cuda_host.
#ifndef AUTOFOCUS_CUDA_DISPATCH_KEY
#define AUTOFOCUS_CUDA_DISPATCH_KEY CUDA
#endif

namespace {

using namespace autofocus;
using namespace autofocus::binding;
using namespace autofocus::cuda;

// Bytes on the device of `input`, by the C function: with a CPU's allocator 0.6 us where torch::stable::new_empty
// takes 1.8.
Tensor memory(const Tensor& input, int64_t bytes) {
  const int64_t stride = 1;
  int32_t device_type = 0;
  AtenTensorHandle handle = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_device_type(input.get(), &device_type) == AOTI_TORCH_SUCCESS &&
                      aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(), device_type,
                                               input.get_device_index(), &handle) == AOTI_TORCH_SUCCESS,
                  "out of memory: torch gives no ", bytes, " bytes of scratch memory");
  return Tensor(handle);
}

// The device of `input` made current, its current stream, and scratch memory of torch's own allocator, which orders its
// reuse by that stream: so what a pass had may go back while its work is only queued.
class Launches {
 public:
  explicit Launches(const Tensor& input) : guard_(input.get_device_index()) {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(input.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                    "torch gives no stream of CUDA device ", input.get_device_index());
    context_ = {stream, [this, input](int64_t bytes) {
                  scratch_.reset();
                  return scratch_.emplace(memory(input, bytes)).data_ptr();
                }};
  }
  Launches(const Launches&) = delete;
  const Context& context() const { return context_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  std::optional<Tensor> scratch_;
  Context context_;
};

// Null if the fast tier runs the pass, else the reason; AUTOFOCUS_CUDA_TIER=simple keeps every pass from it.
const char* refusal_of_fast(Pass pass, const Problem& g, DType dtype, bool tf32) {
  const char* tier = std::getenv("AUTOFOCUS_CUDA_TIER");
  if (tier != nullptr && std::strcmp(tier, "simple") == 0) return "AUTOFOCUS_CUDA_TIER is simple";
  return fast_refusal(pass, g, dtype, tf32);
}
bool takes_fast(Pass pass, const Inputs& in) { return refusal_of_fast(pass, in.g, in.dtype, in.tf32) == nullptr; }

// A bias is a shift that is the same for every branch.
Inputs inputs_of(const Call& call) {
  const int64_t O = call.g.O;
  const TensorView shift = call.bias != nullptr ? TensorView{call.bias, 0, 1, {}} : TensorView{call.shift, O, 1, {}};
  return {call.g, call.dtype, call.input,     call.weight, call.attention, {call.scale, O, 1, {}},
          shift,  call.tf32,  call.few_blocks};
}

// Samples of one plane each, under a kernel with one tap in z, are the planes of one volume: so a tile has planes to
// work on.
void take_samples_as_planes(Problem& g, std::initializer_list<TensorView*> volumes) {
  if (g.kernel.z != 1 || g.input.z != 1 || g.output.z != 1 || g.origin.z != 0) return;
  g.input.z = g.output.z = g.N;
  g.stride.z = g.N = 1;
  for (TensorView* volume : volumes) {
    volume->s.z = volume->n;
    volume->n = 0;
  }
}

// Attention of ones, which branches that have none of their own are given: one element for all.
class Ones {
 public:
  explicit Ones(const Tensor& input) : one_(torch::stable::new_empty(input, {1})) { torch::stable::fill_(one_, 1.0); }
  TensorView view() const { return {one_.data_ptr(), 0, 0, {}}; }

 private:
  Tensor one_;
};

bool any(const Gradients& gradients) {
  return gradients.input.data != nullptr || gradients.attention.data != nullptr || gradients.weight.data != nullptr ||
         gradients.scale != nullptr;
}

// Every gradient that is not null, each by the tier that takes it.
void run_backward(const Tensor& input, Inputs in, TensorView grad_output, Gradients gradients) {
  take_samples_as_planes(in.g, {&in.input, &in.attention, &grad_output, &gradients.input, &gradients.attention});
  const auto fast = [&](Pass pass) { return takes_fast(pass, in); };
  Gradients taken{};
  if (gradients.input.data != nullptr && fast(Pass::kGradInput)) std::swap(taken.input, gradients.input);
  if (gradients.attention.data != nullptr && fast(Pass::kGradAttention))
    std::swap(taken.attention, gradients.attention);
  if ((gradients.weight.data != nullptr || gradients.scale != nullptr) && fast(Pass::kGradWeight)) {
    std::swap(taken.weight, gradients.weight);
    std::swap(taken.scale, gradients.scale);
  }
  if (any(taken)) fast_backward(in, grad_output, taken, Launches(input).context());
  if (!any(gradients)) return;
  const Launches launches(input);
  if (gradients.input.data != nullptr) simple_grad_input(in, grad_output, gradients.input, launches.context());
  if (gradients.attention.data != nullptr)
    simple_grad_attention(in, grad_output, gradients.attention, launches.context());
  if (gradients.weight.data != nullptr || gradients.scale != nullptr)
    simple_grad_weight(in, grad_output, gradients.weight, {gradients.scale, in.g.O, 1, {}}, launches.context());
}

struct Cuda {
  static constexpr int64_t kLargest = INT32_MAX;  // beyond it backends/cuda.py refuses

  // The operators are registered for the device already, so only the device of the others matters.
  static void check_device(const Tensor&) {}

  static void forward(const Tensor& input, const Call& call, TensorView output) {
    const Launches launches(input);
    Inputs in = inputs_of(call);
    take_samples_as_planes(in.g, {&in.input, &in.attention, &output});
    (takes_fast(Pass::kForward, in) ? fast_forward : simple_forward)(in, output, launches.context());
  }

  static void backward(const Tensor& input, const Call& call, const TensorView& grad_output,
                       const Gradients& gradients) {
    const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
    run_backward(input, inputs_of(call), grad_output, gradients);
  }

  // Each branch is a forward pass of its own.
  static void branch_statistics(const Tensor& input, const Call& call, const TensorView& branches, void* mean,
                                void* var) {
    const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
    const Ones ones(input);
    Inputs in = inputs_of(call);
    in.attention = ones.view();
    TensorView written = branches;
    take_samples_as_planes(in.g, {&in.input, &written});
    if (takes_fast(Pass::kForward, in)) {
      fast_branches(in, written, Launches(input).context());
    } else {
      // A large dilation alone leaves lattices smaller than a tile, but lattices it may have.
      for (int64_t k = 0; k < in.g.K; ++k) {
        Inputs one = in;
        one.g = branches_problem(in.g, k, 1);
        (takes_fast(Pass::kForward, one) ? fast_forward : simple_forward)(one, branch_view(written, k, in.dtype),
                                                                          Launches(input).context());
      }
    }
    if (mean != nullptr) branch_moments({call.g, call.dtype, branches, {}, {}}, mean, var, Launches(input).context());
  }

  static void branch_combine(const Tensor& tensor, const BranchTensors& in, void* scale, void* shift,
                             const TensorView& output) {
    cuda::branch_combine(in, scale, shift, output, Launches(tensor).context());
  }

  static void branch_reduce(const Tensor& tensor, const BranchTensors& in, void* mean, void* scale, void* shift,
                            const TensorView& grad_attention, void* grad_scale, void* grad_shift) {
    cuda::branch_reduce(in, mean, scale, shift, grad_attention, grad_scale, grad_shift, Launches(tensor).context());
  }

  static void branch_norm_backward(const Tensor& input, const Call& call, const BranchTensors& in, void* a_coef,
                                   void* b_coef, void* c_coef, const TensorView& grad_branches,
                                   const TensorView& grad_input, const TensorView& grad_weight) {
    const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
    branch_gradients(in, a_coef, b_coef, c_coef, grad_branches, Launches(input).context());
    const Ones ones(input);
    Inputs by_branch = inputs_of(call);
    by_branch.attention = ones.view();
    run_backward(input, by_branch, grad_branches, {grad_input, grad_weight, {}, nullptr});
  }
};

// Why the fast tier does not take a pass ("forward", "grad_input", "grad_attention" or "grad_weight"); empty if it
// does.
std::string fast_tier_refusal(std::string pass, const Tensor& input, const Tensor& weight, Ints output_size,
                              Ints dilations, Ints stride, Ints origin, bool tf32) {
  Problem g = problem_of(input, weight, output_size, dilations, stride, origin, Cuda::kLargest);
  take_samples_as_planes(g, {});
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());  // whose limits decide
  const char* names[] = {"forward", "grad_input", "grad_attention", "grad_weight"};
  const Pass passes[] = {Pass::kForward, Pass::kGradInput, Pass::kGradAttention, Pass::kGradWeight};
  for (int i = 0; i < 4; ++i)
    if (pass == names[i]) {
      const char* refusal = refusal_of_fast(passes[i], g, dtype_of(input), tf32);
      return refusal == nullptr ? "" : refusal;
    }
  STD_TORCH_CHECK(false, "the pass must be forward, grad_input, grad_attention or grad_weight, got ", pass);
  return "";
}

}  // namespace

STABLE_TORCH_LIBRARY(autofocus_cuda, m) {
  define_operators(m);
  m.def(
      "fast_refusal(str tier_pass, Tensor input, Tensor weight, int[] output_size, int[] dilations, int[] stride, "
      "int[] origin, bool tf32) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(autofocus_cuda, AUTOFOCUS_CUDA_DISPATCH_KEY, m) {
  implement_operators<Cuda>(m);
  m.impl("fast_refusal", TORCH_BOX(&fast_tier_refusal));
}
