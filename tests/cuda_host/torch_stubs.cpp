// Functions that binding/cuda.cpp needs from a CUDA build of torch, for a build without CUDA: a device guard, a stream,
// and scratch memory. The scratch memory comes from torch::stable::empty, which tests can have filled with NaN; torch's
// own function of this name cannot be.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include "cuda_emulation.h"

using namespace autofocus::cuda::emulation;

extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  static char any;  // null would not be deleted
  *guard = reinterpret_cast<DeviceGuardHandle>(&any);
  return AOTI_TORCH_SUCCESS;
}

// The end of a call, and so of its scratch memory.
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  guard_scratch(nullptr, 0);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

int autofocus_emulation_allocations = 0;
int64_t autofocus_emulation_allocated = 0;  // bytes

AOTITorchError aoti_torch_empty_strided(int64_t, const int64_t* bytes, const int64_t*, int32_t, int32_t, int32_t,
                                        AtenTensorHandle* memory) {
  ++autofocus_emulation_allocations;
  autofocus_emulation_allocated += *bytes;
  const auto tensor = torch::stable::empty({*bytes + kScratchGuard}, torch::headeronly::ScalarType::Byte);
  std::memset(static_cast<unsigned char*>(tensor.data_ptr()) + *bytes, kPoison, kScratchGuard);
  guard_scratch(tensor.data_ptr(), *bytes);
  return aoti_torch_new_tensor_handle(tensor.get(), memory);
}
}
