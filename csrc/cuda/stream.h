// Where the CUDA half meets torch: the device of a tensor, torch's current stream there, and errors of launches.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "../types.h"

namespace fedpft::cuda {

// While it lives, the tensor's device is current; converts to torch's current stream on that device.
// The device guard is torch's own, so kernels, allocations and library calls made meanwhile all see it.
class Stream {
 public:
  explicit Stream(const torch::stable::Tensor& tensor);
  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Raises a Python error that names the operator, if a launch failed.
void check(cudaError_t error, const char* name);

// The name of a tensor's element type for launchers; raises an error that names the operator for any other type.
Element element_of(const torch::stable::Tensor& tensor, const char* name);

}  // namespace fedpft::cuda
