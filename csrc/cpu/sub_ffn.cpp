// sub_ffn, sub_ffn_backward: a frozen FFN whose activation never exists as a whole.
//
//   z = x W_in^T + b_in              y = act(z) W_out + b_out            dx = ((dy W_out^T) * act'(z)) W_in
//   gated: g = x W_gate^T + b_gate   y = (act(g) * z) W_out + b_out      dx = (dh * z * act'(g)) W_gate + (dh * act(g))
//   W_in counts[j] = tokens under the mask with |act(z_j)| <= eps (gated: act(g_j))
//
// Shapes: x, y (N, D); W_in, W_gate, W_out (K, D), neuron-major; biases (K,), (K,), (D,); counts (K,) int64;
//   saved (P, N, K): pre-activations [g, z] or [z] in x's dtype, or, compact, the derivatives of h by them in bfloat16.
// Accumulation: float32 (float64 for float64) throughout. bfloat16 and float16 tensors are widened to float32 first and
//   results rounded once: no instruction set compiled here multiplies them any faster.
// Determinism: the same bits on every run with the same threads and instruction set; counts are sums of integers.
// Bytes moved: tiles of at most 512 tokens; z is written once (to `saved`, if it is wanted) and read once beside the
// two
//   multiplies; bias, activation, derivative and count work on a row that is in the first-level cache.
// Parallel over tiles (tiles.h): a thread takes a tile from x to y, so the threads meet once in a call, where three
//   calls of eager torch meet three times. Scratch: one tile (512, K) a thread, two in a gated FFN.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "capability.h"
#include "matrix.h"
#include "tiles.h"

namespace {

using fedpft::Activation;
using fedpft::Matrix;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  STD_TORCH_CHECK(false, "sub_ffn: unknown activation ", name);
}

template <class Real>
const fedpft::RowKernels<Real>& row_kernels();
template <>
const fedpft::RowKernels<float>& row_kernels() {
  return fedpft::vector_kernels().float32;
}
template <>
const fedpft::RowKernels<double>& row_kernels() {
  return fedpft::vector_kernels().float64;
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* data(const Optional& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

Tensor empty_like(const Tensor& like, std::vector<int64_t> shape, std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(like, shape, type);
}

Tensor packed(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

Optional packed(const Optional& tensor) { return tensor ? Optional(packed(*tensor)) : std::nullopt; }

// The wrappers check with better words; this keeps a direct call from reading past a tensor's end.
void check(const Optional& tensor, const char* name, ScalarType type, std::vector<int64_t> shape) {
  if (!tensor) return;
  bool fits = tensor->scalar_type() == type && tensor->dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = tensor->size(d) == shape[d];
  STD_TORCH_CHECK(fits, "sub_ffn: ", name, " has a wrong shape or dtype");
}

bool is_half(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

Tensor cast(const Tensor& tensor, ScalarType type) { return torch::stable::to(tensor, type); }

Optional cast(const Optional& tensor, ScalarType type) { return tensor ? Optional(cast(*tensor, type)) : std::nullopt; }

Tensor chosen(const Tensor& rows, const Tensor& neurons) {
  StableIValue stack[] = {
      torch::stable::detail::from(rows), torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(neurons)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Optional chosen(const Optional& rows, const Tensor& neurons) {
  return rows ? Optional(chosen(*rows, neurons)) : std::nullopt;
}

template <class Real>
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& w_in, const Optional& b_in, const Optional& w_gate, const Optional& b_gate,
    const Tensor& w_out, const Optional& b_out, const Optional& mask, Activation act, double eps, bool count, bool save,
    bool compact) {
  const fedpft::RowKernels<Real>& kernels = row_kernels<Real>();
  const int64_t N = x.size(0), D = x.size(1), K = w_in.size(0), P = w_gate ? 2 : 1;
  const fedpft::Tiles tiles(N);
  const bool exact = save && !compact, derive = save && compact;

  const Tensor y = empty_like(x, {N, D});
  const Tensor saved =
      save ? empty_like(x, {P, N, K}, derive ? ScalarType::BFloat16 : x.scalar_type()) : empty_like(x, {0});
  const Tensor counts =
      count ? torch::stable::new_zeros(x, {K}, ScalarType::Long) : empty_like(x, {0}, ScalarType::Long);
  const int64_t scratch_tokens = tiles.slots() * tiles.tokens();
  const Tensor hidden_scratch = empty_like(x, {scratch_tokens, K});
  Optional second_scratch, lane_counts, lane_derivatives;
  if (w_gate && !exact) second_scratch = empty_like(x, {scratch_tokens, K});
  if (count) lane_counts = torch::stable::new_zeros(x, {tiles.lanes(), K}, ScalarType::Int);
  if (derive) lane_derivatives = empty_like(x, {tiles.lanes(), K});

  const Optional packed_in = packed(b_in), packed_gate = packed(b_gate), packed_out = packed(b_out);
  const Optional packed_mask = packed(mask);
  const Real* const bias_first = data<Real>(w_gate ? packed_gate : packed_in);
  const Real* const bias_second = data<Real>(packed_in);
  const bool* const counted = data<bool>(packed_mask);
  int* const count_rows = data<int>(lane_counts);
  Real* const derivative_rows = data<Real>(lane_derivatives);
  unsigned short* const kept = derive ? data<unsigned short>(saved) : nullptr;
  const Matrix<Real> x_all(x), y_all(y), in(w_in), gate = w_gate ? Matrix<Real>(*w_gate) : Matrix<Real>(), out(w_out);
  const Matrix<Real> bias_out(data<Real>(packed_out), 1, D, D);

  tiles.for_each([&](const fedpft::Tile& tile) {
    // first: what act sees; second: what a gated FFN multiplies act(first) with; hidden: what W_out multiplies.
    const int64_t scratch = tile.slot * tiles.tokens() * K;
    const Matrix<Real> hidden(data<Real>(hidden_scratch) + scratch, tile.tokens, K, K);
    Matrix<Real> first = hidden, second;
    if (exact) first.data = data<Real>(saved) + tile.start * K;
    multiply(first, x_all.slice(tile.start, tile.tokens), (w_gate ? gate : in).transposed());
    if (w_gate) {
      second = hidden;
      second.data = exact ? first.data + N * K : data<Real>(second_scratch) + scratch;
      multiply(second, x_all.slice(tile.start, tile.tokens), in.transposed());
    }
    tiles.for_each_row(tile, [&](int64_t lane, int64_t t) {
      Real *z = first.row(t), *up = w_gate ? second.row(t) : nullptr, *h = hidden.row(t);
      unsigned short* compacted = kept ? kept + (tile.start + t) * K : nullptr;
      if (bias_first) kernels.add(z, bias_first, K);
      if (up && bias_second) kernels.add(up, bias_second, K);
      if (compacted) {
        Real* derivative = derivative_rows + lane * K;
        kernels.differentiate(act, z, derivative, K);
        if (up) kernels.multiply(derivative, up, K);
        kernels.narrow(derivative, compacted, K);
      }
      kernels.activate(act, z, h, K);
      if (compacted && up) kernels.narrow(h, compacted + N * K, K);
      if (count && (!counted || counted[tile.start + t])) {
        kernels.count_inactive(h, static_cast<Real>(eps), count_rows + lane * K, K);
      }
      if (up) kernels.multiply(h, up, K);
    });
    const Matrix<Real> y_tile = y_all.slice(tile.start, tile.tokens);
    b_out ? multiply_add(y_tile, bias_out, hidden, out) : multiply(y_tile, hidden, out);
  });
  if (count) {
    int64_t* total = data<int64_t>(counts);
    for (int64_t lane = 0; lane < tiles.lanes(); ++lane) {
      for (int64_t j = 0; j < K; ++j) total[j] += count_rows[lane * K + j];
    }
  }
  return {y, saved, counts};
}

template <class Real>
Tensor backward(
    const Tensor& grad_y, const Tensor& saved, const Tensor& w_in, const Optional& w_gate, const Tensor& w_out,
    Activation act, bool compact) {
  const fedpft::RowKernels<Real>& kernels = row_kernels<Real>();
  const int64_t N = grad_y.size(0), D = grad_y.size(1), K = w_in.size(0);
  const fedpft::Tiles tiles(N);
  const Tensor grad_x = empty_like(grad_y, {N, D}), kept = packed(saved);
  const int64_t scratch_tokens = tiles.slots() * tiles.tokens();
  const Tensor first_scratch = empty_like(grad_y, {scratch_tokens, K});
  Optional second_scratch, lane_active;
  if (w_gate) second_scratch = empty_like(grad_y, {scratch_tokens, K});
  if (w_gate && !compact) lane_active = empty_like(grad_y, {tiles.lanes(), K});
  const Matrix<Real> grad_y_all(grad_y), grad_x_all(grad_x), in(w_in), out(w_out);
  const Matrix<Real> gate = w_gate ? Matrix<Real>(*w_gate) : Matrix<Real>();

  tiles.for_each([&](const fedpft::Tile& tile) {
    // Both start as the gradient of the hidden value and become those of the two pre-activations.
    const int64_t scratch = tile.slot * tiles.tokens() * K;
    const Matrix<Real> first(data<Real>(first_scratch) + scratch, tile.tokens, K, K);
    Matrix<Real> second = first;
    if (w_gate) second.data = data<Real>(second_scratch) + scratch;
    multiply(first, grad_y_all.slice(tile.start, tile.tokens), out.transposed());
    tiles.for_each_row(tile, [&](int64_t lane, int64_t t) {
      Real *grad_first = first.row(t), *grad_second = w_gate ? second.row(t) : nullptr;
      const int64_t position = (tile.start + t) * K;
      if (grad_second) std::copy(grad_first, grad_first + K, grad_second);
      if (compact) {
        const unsigned short* derivative = data<unsigned short>(kept) + position;
        kernels.multiply_bfloat16(grad_first, derivative, K);
        if (grad_second) kernels.multiply_bfloat16(grad_second, derivative + N * K, K);
        return;
      }
      const Real* z = data<Real>(kept) + position;
      kernels.multiply_derivative(act, z, grad_first, K);
      if (grad_second) {
        Real* active = data<Real>(lane_active) + lane * K;
        kernels.activate(act, z, active, K);
        kernels.multiply(grad_second, active, K);
        kernels.multiply(grad_first, z + N * K, K);
      }
    });
    const Matrix<Real> grad_x_tile = grad_x_all.slice(tile.start, tile.tokens);
    multiply(grad_x_tile, first, w_gate ? gate : in);
    if (w_gate) multiply_add(grad_x_tile, grad_x_tile, second, in);
  });
  return grad_x;
}

std::tuple<Tensor, Tensor, Tensor> sub_ffn_cpu(
    Tensor x, Tensor w_in, Optional b_in, Optional w_gate, Optional b_gate, Tensor w_out, Optional b_out,
    Optional neurons, Optional mask, std::string activation, double eps, bool count, bool save, bool compact) {
  if (neurons) {
    w_in = chosen(w_in, *neurons), b_in = chosen(b_in, *neurons), w_gate = chosen(w_gate, *neurons);
    b_gate = chosen(b_gate, *neurons), w_out = chosen(w_out, *neurons);
  }
  const Activation act = activation_of(activation);
  const ScalarType type = x.scalar_type(), wide = is_half(type) ? ScalarType::Float : type;
  STD_TORCH_CHECK(x.dim() == 2 && w_in.dim() == 2, "sub_ffn: x and w_in must have two dimensions");
  const int64_t N = x.size(0), D = x.size(1), K = w_in.size(0);
  check(w_in, "w_in", type, {K, D});
  check(b_in, "b_in", type, {K});
  check(w_gate, "w_gate", type, {K, D});
  check(b_gate, "b_gate", type, {K});
  check(w_out, "w_out", type, {K, D});
  check(b_out, "b_out", type, {D});
  check(mask, "mask", ScalarType::Bool, {N});
  auto run = wide == ScalarType::Double ? forward<double> : forward<float>;
  STD_TORCH_CHECK(wide == ScalarType::Double || wide == ScalarType::Float, "sub_ffn: unsupported dtype");
  if (!is_half(type)) {
    return run(x, w_in, b_in, w_gate, b_gate, w_out, b_out, mask, act, eps, count, save, compact);
  }
  auto [y, saved, counts] =
      run(cast(x, wide), cast(w_in, wide), cast(b_in, wide), cast(w_gate, wide), cast(b_gate, wide), cast(w_out, wide),
          cast(b_out, wide), mask, act, eps, count, save, compact);
  return {cast(y, type), save && compact ? saved : cast(saved, type), counts};
}

Tensor sub_ffn_backward_cpu(
    Tensor grad_y, Tensor saved, Tensor w_in, Optional w_gate, Tensor w_out, Optional neurons, std::string activation,
    bool compact) {
  if (neurons) w_in = chosen(w_in, *neurons), w_gate = chosen(w_gate, *neurons), w_out = chosen(w_out, *neurons);
  const Activation act = activation_of(activation);
  const ScalarType type = grad_y.scalar_type(), wide = is_half(type) ? ScalarType::Float : type;
  STD_TORCH_CHECK(grad_y.dim() == 2 && w_in.dim() == 2, "sub_ffn_backward: grad_y and w_in must have two dimensions");
  const int64_t N = grad_y.size(0), D = grad_y.size(1), K = w_in.size(0);
  check(saved, "saved", compact ? ScalarType::BFloat16 : type, {w_gate ? 2 : 1, N, K});
  check(w_in, "w_in", type, {K, D});
  check(w_gate, "w_gate", type, {K, D});
  check(w_out, "w_out", type, {K, D});
  auto run = wide == ScalarType::Double ? backward<double> : backward<float>;
  STD_TORCH_CHECK(wide == ScalarType::Double || wide == ScalarType::Float, "sub_ffn_backward: unsupported dtype");
  if (!is_half(type)) return run(grad_y, saved, w_in, w_gate, w_out, act, compact);
  const Tensor kept = compact ? saved : cast(saved, wide);
  return cast(
      run(cast(grad_y, wide), kept, cast(w_in, wide), cast(w_gate, wide), cast(w_out, wide), act, compact), type);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fedpft, CPU, m) {
  m.impl("sub_ffn", TORCH_BOX(&sub_ffn_cpu));
  m.impl("sub_ffn_backward", TORCH_BOX(&sub_ffn_backward_cpu));
}
