// Where the CUDA half meets torch: the device of a tensor, torch's current stream there, and errors of launches.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "../tensors.h"

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
  if (error != cudaSuccess) fail(name, ": CUDA error: ", cudaGetErrorString(error));
}

using fedpft::activation_of;
using fedpft::element_of;

}  // namespace fedpft::cuda
