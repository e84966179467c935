// alignment_loss, alignment_loss_backward: how far the student's hidden states are from the teacher's.
//
//   loss = sum (t - s)^2 / sum t^2     ds = (s - t) * 2 * dloss / sum t^2     sums over the tokens under the mask
//
// Shapes: s, t, ds (N, D), s and t with any strides; mask (N,) bool; loss and 1 / sum t^2 () float32, or float64 for
//   float64. No token: both are 0. Tokens that the mask leaves out are not read, and their gradient is 0.
// Accumulation: squares of widened values (float32; float64 for float64), 512 at a time in that type, joined in
//   float64. Determinism: the same bits whatever the number of threads: a block's rows depend on D alone, and blocks
//   are joined in order.
// Bytes moved: forward reads s and t once, backward reads them once and writes ds; rows that are not contiguous are
//   copied first.
// Parallel over blocks of rows of about 2^15 values.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "capability.h"
#include "operands.h"

namespace {

using fedpft::Element;
using fedpft::Mask;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kValuesPerBlock = 1 << 15;

// Two matrices of the same shape and type, row by row.
struct Pair {
  Tensor student, teacher;
  Element element;
  int64_t N, D, bytes, rows_per_block;

  Pair(const Tensor& s, const Tensor& t) : element(fedpft::element_of(s, "student")) {
    if (s.dim() != 2) fedpft::fail("student must have two dimensions");
    N = s.size(0), D = s.size(1), bytes = static_cast<int64_t>(s.element_size());
    fedpft::check(t, "teacher", s.scalar_type(), {N, D});
    student = fedpft::packed_rows(s), teacher = fedpft::packed_rows(t);
    rows_per_block = std::max<int64_t>(1, kValuesPerBlock / std::max<int64_t>(1, D));
  }

  int64_t blocks() const { return (N + rows_per_block - 1) / rows_per_block; }
  ScalarType wide() const { return element == Element::kFloat64 ? ScalarType::Double : ScalarType::Float; }

  // body(block, row, the student's row, the teacher's row), blocks shared among threads.
  template <class Body>
  void for_each_row(const Body& body) const {
    const char *s = static_cast<const char*>(student.const_data_ptr()),
               *t = static_cast<const char*>(teacher.const_data_ptr());
    const int64_t s_stride = student.stride(0) * bytes, t_stride = teacher.stride(0) * bytes;
    torch::stable::parallel_for(0, blocks(), 1, [&](int64_t first, int64_t last) {
      for (int64_t row = first * rows_per_block; row < std::min(N, last * rows_per_block); ++row) {
        body(row / rows_per_block, row, s + row * s_stride, t + row * t_stride);
      }
    });
  }
};

double scalar(const Tensor& tensor, const char* name, ScalarType type) {
  fedpft::check(tensor, name, type, {});
  return type == ScalarType::Double ? *static_cast<const double*>(tensor.const_data_ptr())
                                    : *static_cast<const float*>(tensor.const_data_ptr());
}

Tensor scalar_like(const Tensor& like, double value, ScalarType type) {
  Tensor result = torch::stable::new_empty(like, {}, type);
  if (type == ScalarType::Double) {
    *static_cast<double*>(result.mutable_data_ptr()) = value;
  } else {
    *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(value);
  }
  return result;
}

std::tuple<Tensor, Tensor> alignment_loss_cpu(Tensor student, Tensor teacher, Optional mask) {
  struct Sums {
    double error = 0.0, energy = 0.0;
    int64_t tokens = 0;
  };
  const Pair pair(student, teacher);
  const Mask counted(mask, pair.N);
  const fedpft::StreamKernels& kernels = *fedpft::vector_kernels().streams;
  std::vector<Sums> sums(pair.blocks());
  pair.for_each_row([&](int64_t block, int64_t row, const char* s, const char* t) {
    if (!counted[row]) return;
    kernels.add_errors(pair.element, s, t, pair.D, &sums[block].error, &sums[block].energy);
    ++sums[block].tokens;
  });
  Sums total;
  for (const Sums& block : sums) {
    total.error += block.error, total.energy += block.energy, total.tokens += block.tokens;
  }
  const double inverse_energy = total.tokens > 0 ? 1.0 / total.energy : 0.0;
  return {
      scalar_like(student, total.error * inverse_energy, pair.wide()),
      scalar_like(student, inverse_energy, pair.wide())};
}

Tensor alignment_loss_backward_cpu(Tensor grad, Tensor inverse_energy, Tensor student, Tensor teacher, Optional mask) {
  const Pair pair(student, teacher);
  const Mask counted(mask, pair.N);
  const double factor = 2.0 * scalar(grad, "grad", pair.wide()) * scalar(inverse_energy, "inverse_energy", pair.wide());
  const fedpft::StreamKernels& kernels = *fedpft::vector_kernels().streams;
  Tensor gradient = torch::stable::new_empty(student, {pair.N, pair.D});
  char* out = static_cast<char*>(gradient.mutable_data_ptr());
  pair.for_each_row([&](int64_t, int64_t row, const char* s, const char* t) {
    char* out_row = out + row * pair.D * pair.bytes;
    if (counted[row]) return kernels.error_gradient(pair.element, s, t, factor, out_row, pair.D);
    std::memset(out_row, 0, pair.D * pair.bytes);
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fedpft, CPU, m) {
  m.impl("alignment_loss", TORCH_BOX(&alignment_loss_cpu));
  m.impl("alignment_loss_backward", TORCH_BOX(&alignment_loss_backward_cpu));
}
