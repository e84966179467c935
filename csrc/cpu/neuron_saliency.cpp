// neuron_saliency: the importance of every FFN neuron, for all layers in one call.
//
//   s[l, j] = sqrt( sum_i w_in[l][j, i]^2 + sum_i w_gate[l][j, i]^2 + sum_i w_out[l][i, j]^2 )
//
// Shapes: L layers; w_in, w_gate (F, D), w_out (D, F), any strides; s (L, F) float32.
// Accumulation: squares of widened values (float32; float64 for float64), short partial sums in that type, joined in
// float64; hence no overflow where float32 has none, and ties between equal neurons stay ties.
// Determinism: a neuron is summed by one thread, in an order that does not depend on the number of threads.
// Bytes moved: every weight is read once, nothing is copied or transposed; 4 L F bytes are written.
// Parallel over blocks of neurons of all layers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "capability.h"
#include "operands.h"

namespace {

using fedpft::Element;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kNeuronsPerTask = 256;

// A weight seen neuron by neuron, whichever way it lies in memory.
struct Neurons {
  const char* data;
  int64_t hidden, neuron_stride, hidden_stride;
};

Neurons by_neuron(const Tensor& weight, int64_t neuron_dim, int64_t neurons, ScalarType type) {
  if (weight.dim() != 2 || weight.size(neuron_dim) != neurons || weight.scalar_type() != type) {
    fedpft::fail("neuron_saliency: a weight differs in its neurons or dtype from w_in[0]");
  }
  return {
      static_cast<const char*>(weight.const_data_ptr()), weight.size(1 - neuron_dim), weight.stride(neuron_dim),
      weight.stride(1 - neuron_dim)};
}

Tensor neuron_saliency_cpu(std::vector<Tensor> w_in, std::vector<Tensor> w_gate, std::vector<Tensor> w_out) {
  const int64_t layers = static_cast<int64_t>(w_in.size()), neurons = w_in.at(0).size(0);
  const ScalarType type = w_in[0].scalar_type();
  const Element element = fedpft::element_of(w_in[0], "w_in[0]");
  const int64_t bytes = static_cast<int64_t>(w_in[0].element_size());

  std::vector<std::vector<Neurons>> parts(layers);
  for (int64_t l = 0; l < layers; ++l) {
    parts[l] = {by_neuron(w_in[l], 0, neurons, type), by_neuron(w_out.at(l), 1, neurons, type)};
    if (!w_gate.empty()) parts[l].push_back(by_neuron(w_gate.at(l), 0, neurons, type));
  }
  Tensor saliency = torch::stable::new_empty(w_in[0], {layers, neurons}, ScalarType::Float);
  float* out = static_cast<float*>(saliency.mutable_data_ptr());

  const fedpft::StreamKernels& kernels = *fedpft::vector_kernels().streams;
  const int64_t blocks = (neurons + kNeuronsPerTask - 1) / kNeuronsPerTask;
  torch::stable::parallel_for(0, layers * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t l = task / blocks, first = task % blocks * kNeuronsPerTask;
      const int64_t count = std::min(kNeuronsPerTask, neurons - first);
      double energy[kNeuronsPerTask] = {};
      for (const Neurons& part : parts[l]) {
        kernels.add_squares(
            element, part.data + first * part.neuron_stride * bytes, count, part.hidden, part.neuron_stride,
            part.hidden_stride, energy);
      }
      for (int64_t j = 0; j < count; ++j) out[l * neurons + first + j] = static_cast<float>(std::sqrt(energy[j]));
    }
  });
  return saliency;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fedpft, CPU, m) { m.impl("neuron_saliency", TORCH_BOX(&neuron_saliency_cpu)); }
