// torch.ops.autofocus_cpu: the kernels of the widest instruction set that this CPU has, on torch's threads.
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <string>

#include "../cpu/kernels.h"
#include "operators.h"

namespace {

using namespace autofocus;
using namespace autofocus::binding;

void parallel(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, body);
}

// The widest instruction set this CPU has; AUTOFOCUS_CPU_ISA forces another ("avx512", "avx2", "generic").
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* forced = std::getenv("AUTOFOCUS_CPU_ISA");
    const std::string name = forced == nullptr ? "" : forced;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && (name.empty() || name == "avx512")) return avx512_kernels;
    if (avx2 && (name.empty() || name == "avx512" || name == "avx2")) return avx2_kernels;
#endif
    return generic_kernels;
  }();
  return chosen;
}

std::string isa() { return kernels().name; }

View<const void> read(const TensorView& tensor) { return {tensor.data, tensor.n, tensor.c, tensor.s}; }
View<void> write(const TensorView& tensor) { return {tensor.data, tensor.n, tensor.c, tensor.s}; }

NormArguments<void, void> norm_arguments(const BranchTensors& in) {
  NormArguments<void, void> args{};
  args.g = in.g;
  args.branches = {write(in.branches), in.branches.k};
  args.attention = read(in.attention);
  args.grad_output = read(in.grad_output);
  args.parallel = parallel;
  return args;
}

struct Cpu {
  static constexpr int64_t kLargest = int64_t(1) << 48;  // LARGEST of autofocus_kernels/geometry.py

  static void check_device(const Tensor& input) { STD_TORCH_CHECK(input.is_cpu(), "input must be a CPU tensor"); }

  static void forward(const Tensor&, const Call& call, const TensorView& output) {
    kernels().forward(call.dtype, {call.g, read(call.input), read(call.weight), read(call.attention), call.bias,
                                   call.scale, call.shift, write(output), parallel});
  }

  static void backward(const Tensor&, const Call& call, const TensorView& grad_output, const Gradients& gradients) {
    kernels().backward(call.dtype, {call.g, read(grad_output), read(call.input), read(call.weight),
                                    read(call.attention), call.bias, call.scale, call.shift, write(gradients.input),
                                    write(gradients.weight), write(gradients.attention), gradients.scale, parallel});
  }

  static void branch_statistics(const Tensor&, const Call& call, const TensorView& branches, void* mean, void* var) {
    NormArguments<void, void> args{};
    args.g = call.g;
    args.input = read(call.input);
    args.weight = read(call.weight);
    args.branches = {write(branches), branches.k};
    args.mean = mean;
    args.var = var;
    args.parallel = parallel;
    kernels().branch_statistics(call.dtype, args);
  }

  static void branch_combine(const Tensor&, const BranchTensors& in, void* scale, void* shift, const TensorView& output) {
    NormArguments<void, void> args = norm_arguments(in);
    args.scale = scale;
    args.shift = shift;
    args.output = write(output);
    kernels().branch_combine(in.dtype, args);
  }

  static void branch_reduce(const Tensor&, const BranchTensors& in, void* mean, void* scale, void* shift,
                            const TensorView& grad_attention, void* grad_scale, void* grad_shift) {
    NormArguments<void, void> args = norm_arguments(in);
    args.mean = mean;
    args.scale = scale;
    args.shift = shift;
    args.grad_attention = write(grad_attention);
    args.grad_scale = grad_scale;
    args.grad_shift = grad_shift;
    kernels().branch_reduce(in.dtype, args);
  }

  // dy_k exists one lattice and channel group at a time: the memory offered for all of it stays unused.
  static void branch_norm_backward(const Tensor&, const Call& call, const BranchTensors& in, void* a_coef, void* b_coef,
                                   void* c_coef, const TensorView&, const TensorView& grad_input,
                                   const TensorView& grad_weight) {
    NormArguments<void, void> args = norm_arguments(in);
    args.g = call.g;
    args.input = read(call.input);
    args.weight = read(call.weight);
    args.scale = a_coef;
    args.slope = b_coef;
    args.shift = c_coef;
    args.grad_input = write(grad_input);
    args.grad_weight = write(grad_weight);
    kernels().branch_norm_backward(call.dtype, args);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY(autofocus_cpu, m) {
  define_operators(m);
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(autofocus_cpu, CPU, m) { implement_operators<Cpu>(m); }

STABLE_TORCH_LIBRARY_IMPL(autofocus_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
