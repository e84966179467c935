#include "stream.h"

#include <dlfcn.h>

namespace fedpft::cuda {
namespace {

using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// The function lives in libtorch_cuda.so, which a torch for CPUs lacks. So it is looked up when the first CUDA tensor
// arrives, in the library that torch has loaded; linking it would tie this binary to CUDA builds of torch.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* function = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  if (function == nullptr) {
    fail("fedpft: torch's current CUDA stream was not found in libtorch_cuda.so -> report this torch version");
  }
  return reinterpret_cast<CurrentStream>(function);
}

}  // namespace

Stream::Stream(const torch::stable::Tensor& tensor) : guard_(std::in_place, tensor.get_device()) {
  static const CurrentStream get = find_current_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(tensor.get_device(), &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

}  // namespace fedpft::cuda
