#include "stream.h"

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

namespace fedpft::cuda {
namespace {

using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// The function lives in libtorch_cuda.so, which a torch for CPUs lacks. So it is looked up when the first CUDA tensor
// arrives, in the library that torch has loaded; linking it would tie this binary to CUDA builds of torch.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* function = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  STD_TORCH_CHECK(
      function != nullptr,
      "fedpft: torch's current CUDA stream was not found in libtorch_cuda.so -> report this torch version");
  return reinterpret_cast<CurrentStream>(function);
}

cudaStream_t current_stream(int32_t device) {
  static const CurrentStream get = find_current_stream();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace

Stream::Stream(const torch::stable::Tensor& tensor)
    : guard_(tensor.get_device()), stream_(current_stream(tensor.get_device())) {}

void check(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, name, ": CUDA error: ", cudaGetErrorString(error));
}

Element element_of(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::Double:
      return Element::kFloat64;
    case ScalarType::Half:
      return Element::kFloat16;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": unsupported dtype");
  }
}

}  // namespace fedpft::cuda
