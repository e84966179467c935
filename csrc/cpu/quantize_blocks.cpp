// quantize_blocks: 8 bits a value, one scale for each block of consecutive values.
//
//   scale_b = max |x_i| / 127 over block b     q_i = round(x_i / scale_b), halves to even
//
// Shapes: x (n,), any stride; q (n,) int8 in [-127, 127]; scales (ceil(n / block),) float32.
// Accumulation: none; x is narrowed (float64) or widened (halves) to float32 first.
// Not finite: a block with such a value has a scale that is not finite. 0 / 0 and inf / inf give q = 0.
// Determinism: every value's result depends on its block alone; all instruction sets give the same bits.
// Bytes moved: x is read once from memory (a second time from the cache, if a block fits there), q and scales written.
// Parallel over blocks.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "capability.h"
#include "operands.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kValuesPerTask = 1 << 15;

std::tuple<Tensor, Tensor> quantize_blocks_cpu(Tensor x, int64_t block) {
  const fedpft::Element element = fedpft::element_of(x, "x");
  if (x.dim() != 1) fedpft::fail("x must have one dimension");
  if (block <= 0) fedpft::fail("block must be positive");
  const int64_t n = x.size(0), blocks = n / block + (n % block != 0), bytes = static_cast<int64_t>(x.element_size());
  const Tensor values = fedpft::packed(x);
  Tensor q = torch::stable::new_empty(x, {n}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(x, {blocks}, ScalarType::Float);
  const char* in = static_cast<const char*>(values.const_data_ptr());
  signed char* out = static_cast<signed char*>(q.mutable_data_ptr());
  float* out_scales = static_cast<float*>(scales.mutable_data_ptr());

  const fedpft::StreamKernels& kernels = *fedpft::vector_kernels().streams;
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kValuesPerTask / block), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, count = std::min(block, n - first);
      out_scales[b] = kernels.quantize(element, in + first * bytes, out + first, count);
    }
  });
  return {q, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fedpft, CPU, m) { m.impl("quantize_blocks", TORCH_BOX(&quantize_blocks_cpu)); }
