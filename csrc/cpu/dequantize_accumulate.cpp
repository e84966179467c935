// dequantize_accumulate: adds what quantize_blocks made of an update to a running sum.
//
//   total_i += weight * (scale_b * q_i)     b the block of i
//
// Shapes: total (n,) float32, in place, q (n,) int8, any strides; scales (ceil(n / block),) float32.
// Accumulation: float32.
// Determinism: no sum crosses elements.
// Bytes moved: total is read and written once, q read once; a total with gaps is copied and copied back.
// Parallel over blocks.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "capability.h"
#include "operands.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kValuesPerTask = 1 << 15;

void dequantize_accumulate_cpu(Tensor total, Tensor q, Tensor scales, double weight, int64_t block) {
  if (total.dim() != 1) fedpft::fail("total must have one dimension");
  if (block <= 0) fedpft::fail("block must be positive");
  const int64_t n = total.size(0), blocks = n / block + (n % block != 0);
  fedpft::check(total, "total", ScalarType::Float, {n});
  fedpft::check(q, "q", ScalarType::Char, {n});
  fedpft::check(scales, "scales", ScalarType::Float, {blocks});
  const Tensor sum = fedpft::packed(total), steps = fedpft::packed(q), factors = fedpft::packed(scales);
  float* out = static_cast<float*>(sum.mutable_data_ptr());
  const signed char* in = static_cast<const signed char*>(steps.const_data_ptr());
  const float* in_scales = static_cast<const float*>(factors.const_data_ptr());

  const fedpft::StreamKernels& kernels = *fedpft::vector_kernels().streams;
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kValuesPerTask / block), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, count = std::min(block, n - first);
      kernels.dequantize_add(in + first, in_scales[b], static_cast<float>(weight), out + first, count);
    }
  });
  if (!total.is_contiguous()) torch::stable::copy_(total, sum);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fedpft, CPU, m) { m.impl("dequantize_accumulate", TORCH_BOX(&dequantize_accumulate_cpu)); }
