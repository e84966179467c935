// Where the CUDA half meets torch: the device of a tensor, torch's current stream there, types, and errors of launches.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

#include "../types.h"

#ifndef FEDPFT_LIBRARY  // STABLE_TORCH_LIBRARY_IMPL(FEDPFT_LIBRARY, CUDA, m): tests/cuda_emulator has one of its own
#define FEDPFT_LIBRARY fedpft
#endif

namespace fedpft::cuda {

// While it lives, the tensor's device is current; converts to torch's current stream on that device.
// The device guard is torch's own, so kernels, allocations and library calls made meanwhile all see it.
class Stream {
 public:
  explicit Stream(const torch::stable::Tensor& tensor);
  operator cudaStream_t() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

// Raises a Python error that names the operator, if a launch failed.
inline void check(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, name, ": CUDA error: ", cudaGetErrorString(error));
}

// The name of a tensor's element type for launchers; raises an error that names the operator for any other type.
inline Element element_of(const torch::stable::Tensor& tensor, const char* name) {
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

// The activation of that name; raises an error that names the operator if there is none.
inline Activation activation_of(const std::string& activation, const char* name) {
  if (activation == "relu") return Activation::kRelu;
  if (activation == "gelu") return Activation::kGelu;
  if (activation == "gelu_tanh") return Activation::kGeluTanh;
  if (activation == "silu") return Activation::kSilu;
  STD_TORCH_CHECK(false, name, ": unknown activation ", activation);
}

}  // namespace fedpft::cuda
