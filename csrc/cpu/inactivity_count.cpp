// inactivity_count: at how many tokens every neuron is inactive.
//
//   counts_j = tokens n under the mask with |act(z_nj)| <= eps
//
// Shapes: z (N, F), any strides; mask (N,) bool; counts (F,) int64.
// Accumulation: act in float32 (float64 for float64); counts are whole numbers.
// Determinism: sums of whole numbers, so the same whatever the number of threads.
// Bytes moved: z is read once, where the mask lets it be read at all; rows that are not contiguous are copied first.
// Parallel over tokens; a thread counts on its own and adds its counts at the end.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <mutex>
#include <string>

#include "capability.h"
#include "operands.h"

namespace {

using fedpft::Activation;
using fedpft::Element;
using fedpft::Mask;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kValuesPerTask = 1 << 14;

template <class Real>
void count(
    const fedpft::RowKernels<Real>& kernels, const Tensor& z, Element element, const Mask& counted, Activation act,
    double eps, int64_t* total) {
  const int64_t N = z.size(0), F = z.size(1);
  const int64_t stride = z.stride(0) * static_cast<int64_t>(z.element_size());
  const bool half = element == Element::kFloat16 || element == Element::kBFloat16;
  const char* rows = static_cast<const char*>(z.const_data_ptr());
  std::mutex adding;
  torch::stable::parallel_for(
      0, N, std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(1, F)), [&](int64_t begin, int64_t end) {
        std::vector<int> counts(F);
        std::vector<Real> active(F);
        for (int64_t n = begin; n < end; ++n) {
          if (!counted[n]) continue;
          const void* row = rows + n * stride;
          if constexpr (sizeof(Real) == sizeof(float)) {
            if (half) fedpft::vector_kernels().streams->widen(element, row, active.data(), F);
          }
          kernels.activate(act, half ? active.data() : static_cast<const Real*>(row), active.data(), F);
          kernels.count_inactive(active.data(), static_cast<Real>(eps), counts.data(), F);
        }
        const std::lock_guard<std::mutex> lock(adding);
        for (int64_t j = 0; j < F; ++j) total[j] += counts[j];
      });
}

Tensor inactivity_count_cpu(Tensor z, std::optional<Tensor> mask, std::string activation, double eps) {
  const Element element = fedpft::element_of(z, "z");
  if (z.dim() != 2) fedpft::fail("z must have two dimensions");
  const Activation act = fedpft::activation_of(activation, "inactivity_count");
  const Mask counted(mask, z.size(0));
  const Tensor rows = fedpft::packed_rows(z), counts = torch::stable::new_zeros(z, {z.size(1)}, ScalarType::Long);
  int64_t* total = static_cast<int64_t*>(counts.mutable_data_ptr());
  const fedpft::VectorKernels& kernels = fedpft::vector_kernels();
  if (element == Element::kFloat64) {
    count(kernels.float64, rows, element, counted, act, eps, total);
  } else {
    count(kernels.float32, rows, element, counted, act, eps, total);
  }
  return counts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fedpft, CPU, m) { m.impl("inactivity_count", TORCH_BOX(&inactivity_count_cpu)); }
