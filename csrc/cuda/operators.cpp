// The operators on CUDA but for the FFN: checks, outputs and workspaces from torch's allocator, then a launcher.
//
// Nothing here waits for the GPU, and all memory belongs to the call, so calls on several streams do not meet and a
// CUDA graph can capture them. The wrappers check with better words; the checks here keep a direct call inside its
// tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "launchers.h"
#include "stream.h"

namespace {

using fedpft::cuda::check;
using fedpft::cuda::Stream;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void require(bool fits, const char* name, const char* argument) {
  STD_TORCH_CHECK(fits, name, ": ", argument, " has a wrong shape, dtype or device");
}

bool is_vector(const Tensor& tensor, ScalarType type, int64_t size, const Tensor& like) {
  return tensor.dim() == 1 && tensor.size(0) == size && tensor.scalar_type() == type &&
         tensor.is_cuda() == like.is_cuda() && tensor.get_device() == like.get_device();
}

void dequantize_accumulate(Tensor total, Tensor q, Tensor scales, double weight, int64_t block) {
  constexpr const char* name = "dequantize_accumulate";
  require(total.dim() == 1 && total.scalar_type() == ScalarType::Float, name, "total");
  require(block > 0, name, "block");
  const int64_t n = total.size(0);
  require(is_vector(q, ScalarType::Char, n, total), name, "q");
  require(is_vector(scales, ScalarType::Float, n / block + (n % block != 0), total), name, "scales");
  const Stream stream(total);
  check(
      fedpft_dequantize_accumulate(
          static_cast<float*>(total.mutable_data_ptr()), static_cast<const int8_t*>(q.const_data_ptr()),
          static_cast<const float*>(scales.const_data_ptr()), static_cast<float>(weight), block, n, total.stride(0),
          q.stride(0), scales.stride(0), stream),
      name);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FEDPFT_LIBRARY, CUDA, m) {
  m.impl("dequantize_accumulate", TORCH_BOX(&dequantize_accumulate));
}
