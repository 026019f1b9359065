// torch.ops.autofocus_cpu: the kernels of the widest instruction set that this CPU has, on torch's threads.
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>

#include "../cpu/bfloat16_gemm.h"
#include "../cpu/kernels.h"
#include "operators.h"

namespace {

using namespace autofocus;
using namespace autofocus::binding;

void parallel(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  // An error that leaves parallel_for has lost its type and message: it goes round.
  std::exception_ptr error;
  std::mutex mutex;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// The widest instruction set that this CPU has, or the widest up to the one that AUTOFOCUS_CPU_ISA names ("avx512",
// "avx2", "generic").
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* forced = std::getenv("AUTOFOCUS_CPU_ISA");
    const std::string name = forced == nullptr ? "" : forced;
    STD_TORCH_CHECK(name.empty() || name == "avx512" || name == "avx2" || name == "generic",
                    "AUTOFOCUS_CPU_ISA must be avx512, avx2 or generic, got ", name);
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

// What multiplies tensors of bfloat16.
std::string bfloat16_products() {
  if (isa() != "avx512" || !has_bfloat16_gemm()) return "float32";
  return has_amx() ? "AMX" : "AVX512_BF16";
}

struct Cpu {
  static constexpr int64_t kLargest = binding::kLargest;

  static void check_device(const Tensor& input) { STD_TORCH_CHECK(input.is_cpu(), "input must be a CPU tensor"); }

  static void forward(const Tensor&, const Call& call, const TensorView& output) {
    kernels().forward(call, output, parallel);
  }

  static void backward(const Tensor&, const Call& call, const TensorView& grad_output, const Gradients& gradients) {
    kernels().backward(call, grad_output, gradients, parallel);
  }

  static void branch_statistics(const Tensor&, const Call& call, const TensorView& branches, void* mean, void* var) {
    kernels().branch_statistics(call, branches, mean, var, parallel);
  }

  static void branch_combine(const Tensor&, const BranchTensors& in, void* scale, void* shift,
                             const TensorView& output) {
    kernels().branch_combine(in, scale, shift, output, parallel);
  }

  static void branch_reduce(const Tensor&, const BranchTensors& in, void* mean, void* scale, void* shift,
                            const TensorView& grad_attention, void* grad_scale, void* grad_shift) {
    kernels().branch_reduce(in, mean, scale, shift, grad_attention, grad_scale, grad_shift, parallel);
  }

  // dy_k exists one lattice and channel group at a time: the memory offered for all of it stays unused.
  static void branch_norm_backward(const Tensor&, const Call& call, const BranchTensors& in, void* a_coef, void* b_coef,
                                   void* c_coef, const TensorView&, const TensorView& grad_input,
                                   const TensorView& grad_weight) {
    kernels().branch_norm_backward(call, in, a_coef, b_coef, c_coef, grad_input, grad_weight, parallel);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY(autofocus_cpu, m) {
  define_operators(m);
  m.def("isa() -> str");
  m.def("bfloat16_products() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(autofocus_cpu, CPU, m) { implement_operators<Cpu>(m); }

STABLE_TORCH_LIBRARY_IMPL(autofocus_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("bfloat16_products", TORCH_BOX(&bfloat16_products));
}
