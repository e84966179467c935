// The operators on CUDA but for the FFN: checks, outputs and workspaces from torch's allocator, then a launcher.
//
// Nothing here waits for the GPU, and all memory belongs to the call, so calls on several streams do not meet and a
// CUDA graph can capture them. The wrappers check with better words; the checks here keep a direct call inside its
// tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "launchers.h"
#include "stream.h"

namespace {

using namespace fedpft::cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

void require(bool fits, const char* name, const char* argument) {
  if (!fits) fedpft::fail(name, ": ", argument, " has a wrong shape, dtype or device");
}

bool is(const Tensor& tensor, ScalarType type, const std::vector<int64_t>& shape, const Tensor& on) {
  bool fits = tensor.scalar_type() == type && tensor.dim() == static_cast<int64_t>(shape.size()) &&
              tensor.is_cuda() == on.is_cuda() && tensor.get_device() == on.get_device();
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = tensor.size(d) == shape[d];
  return fits;
}

bool is_mask(const Optional& mask, int64_t tokens, const Tensor& on) {
  return !mask || is(*mask, ScalarType::Bool, {tokens}, on);
}

const bool* data(const Optional& mask) { return mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr; }

int64_t stride(const Optional& mask) { return mask ? mask->stride(0) : 0; }

ScalarType wide(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

int64_t blocks_of(int64_t n, int64_t block) { return n / block + (n % block != 0); }

SaliencyWeight by_neuron(const Tensor& weight, int64_t neuron_dim, int64_t neurons, const Tensor& like) {
  constexpr const char* name = "neuron_saliency";
  require(weight.dim() == 2 && weight.size(neuron_dim) == neurons, name, "a weight");
  const int64_t hidden = weight.size(1 - neuron_dim);
  require(is(weight, like.scalar_type(), {weight.size(0), weight.size(1)}, like), name, "a weight");
  return {weight.const_data_ptr(), hidden, weight.stride(neuron_dim), weight.stride(1 - neuron_dim)};
}

Tensor neuron_saliency(std::vector<Tensor> w_in, std::vector<Tensor> w_gate, std::vector<Tensor> w_out) {
  constexpr const char* name = "neuron_saliency";
  const Tensor& like = w_in.at(0);
  require(like.dim() == 2, name, "w_in");
  const int64_t layers = static_cast<int64_t>(w_in.size()), neurons = like.size(0);
  std::vector<SaliencyWeight> weights;
  for (int64_t l = 0; l < layers; ++l) {
    weights.push_back(by_neuron(w_in[l], 0, neurons, like));
    if (!w_gate.empty()) weights.push_back(by_neuron(w_gate.at(l), 0, neurons, like));
    weights.push_back(by_neuron(w_out.at(l), 1, neurons, like));
  }
  const Stream stream(like);
  const Tensor saliency = torch::stable::new_empty(like, {layers, neurons}, ScalarType::Float);
  check(
      fedpft_neuron_saliency(
          element_of(like, name), weights.data(), w_gate.empty() ? 2 : 3, layers, neurons,
          static_cast<float*>(saliency.mutable_data_ptr()), stream),
      name);
  return saliency;
}

Tensor inactivity_count(Tensor z, Optional mask, std::string activation, double eps) {
  constexpr const char* name = "inactivity_count";
  require(z.dim() == 2, name, "z");
  require(is_mask(mask, z.size(0), z), name, "mask");
  const Stream stream(z);
  const Tensor counts = torch::stable::new_zeros(z, {z.size(1)}, ScalarType::Long);
  check(
      fedpft_inactivity_count(
          element_of(z, name), z.const_data_ptr(), z.size(0), z.size(1), z.stride(0), z.stride(1), data(mask),
          stride(mask), activation_of(activation, name), eps, static_cast<int64_t*>(counts.mutable_data_ptr()), stream),
      name);
  return counts;
}

AlignmentStates states(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)}; }

void require_states(const char* name, const Tensor& student, const Tensor& teacher, const Optional& mask) {
  require(student.dim() == 2, name, "student");
  require(is(teacher, student.scalar_type(), {student.size(0), student.size(1)}, student), name, "teacher");
  require(is_mask(mask, student.size(0), student), name, "mask");
}

std::tuple<Tensor, Tensor> alignment_loss(Tensor student, Tensor teacher, Optional mask) {
  constexpr const char* name = "alignment_loss";
  require_states(name, student, teacher, mask);
  const int64_t N = student.size(0), D = student.size(1);
  static_assert(sizeof(AlignmentSums) == 3 * sizeof(double));
  const Stream stream(student);
  const Tensor loss = torch::stable::new_empty(student, {}, wide(student));
  const Tensor inverse_energy = torch::stable::new_empty(student, {}, wide(student));
  const Tensor sums = torch::stable::new_empty(student, {fedpft_alignment_loss_blocks(N), 3}, ScalarType::Double);
  check(
      fedpft_alignment_loss(
          element_of(student, name), states(student), states(teacher), data(mask), stride(mask), N, D,
          static_cast<AlignmentSums*>(sums.mutable_data_ptr()), loss.mutable_data_ptr(),
          inverse_energy.mutable_data_ptr(), stream),
      name);
  return {loss, inverse_energy};
}

Tensor alignment_loss_backward(Tensor grad, Tensor inverse_energy, Tensor student, Tensor teacher, Optional mask) {
  constexpr const char* name = "alignment_loss_backward";
  require_states(name, student, teacher, mask);
  require(is(grad, wide(student), {}, student), name, "grad");
  require(is(inverse_energy, wide(student), {}, student), name, "inverse_energy");
  const int64_t N = student.size(0), D = student.size(1);
  const Stream stream(student);
  const Tensor grad_student = torch::stable::new_empty(student, {N, D});
  check(
      fedpft_alignment_loss_backward(
          element_of(student, name), grad.const_data_ptr(), inverse_energy.const_data_ptr(), states(student),
          states(teacher), data(mask), stride(mask), N, D, grad_student.mutable_data_ptr(), stream),
      name);
  return grad_student;
}

std::tuple<Tensor, Tensor> quantize_blocks(Tensor x, int64_t block) {
  constexpr const char* name = "quantize_blocks";
  require(x.dim() == 1, name, "x");
  require(block > 0, name, "block");
  const int64_t n = x.size(0);
  const Stream stream(x);
  const Tensor q = torch::stable::new_empty(x, {n}, ScalarType::Char);
  const Tensor scales = torch::stable::new_empty(x, {blocks_of(n, block)}, ScalarType::Float);
  check(
      fedpft_quantize_blocks(
          element_of(x, name), x.const_data_ptr(), n, x.stride(0), block, static_cast<int8_t*>(q.mutable_data_ptr()),
          static_cast<float*>(scales.mutable_data_ptr()), stream),
      name);
  return {q, scales};
}

void dequantize_accumulate(Tensor total, Tensor q, Tensor scales, double weight, int64_t block) {
  constexpr const char* name = "dequantize_accumulate";
  require(total.dim() == 1 && total.scalar_type() == ScalarType::Float, name, "total");
  require(block > 0, name, "block");
  const int64_t n = total.size(0);
  require(is(q, ScalarType::Char, {n}, total), name, "q");
  require(is(scales, ScalarType::Float, {blocks_of(n, block)}, total), name, "scales");
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
  m.impl("neuron_saliency", TORCH_BOX(&neuron_saliency));
  m.impl("inactivity_count", TORCH_BOX(&inactivity_count));
  m.impl("alignment_loss", TORCH_BOX(&alignment_loss));
  m.impl("alignment_loss_backward", TORCH_BOX(&alignment_loss_backward));
  m.impl("quantize_blocks", TORCH_BOX(&quantize_blocks));
  m.impl("dequantize_accumulate", TORCH_BOX(&dequantize_accumulate));
}
