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
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "capability.h"
#include "tiles.h"

namespace {

using fedpft::Activation;
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

Tensor rows(Tensor tensor, int64_t first, int64_t count) { return torch::stable::narrow(tensor, 0, first, count); }

Tensor plane(const Tensor& stack, int64_t index) { return torch::stable::select(stack, 0, index); }

Tensor empty_like(const Tensor& like, std::vector<int64_t> shape, std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(like, shape, type);
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

Tensor packed(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

Optional packed(const Optional& tensor) { return tensor ? Optional(packed(*tensor)) : std::nullopt; }

template <class T>
const T* data_or_null(const Optional& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

void multiply(Tensor out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out = addend + a b; the addend broadcasts, and may be out.
void multiply_add(Tensor out, const Tensor& addend, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), addend.get(), a.get(), b.get(), 1.0, 1.0));
}

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

template <class Real>
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& w_in, const Optional& b_in, const Optional& w_gate, const Optional& b_gate,
    const Tensor& w_out, const Optional& b_out, const Optional& mask, Activation act, double eps, bool count, bool save,
    bool compact) {
  const fedpft::RowKernels<Real>& kernels = row_kernels<Real>();
  const int64_t N = x.size(0), D = x.size(1), K = w_in.size(0), P = w_gate ? 2 : 1;
  const fedpft::Tiles tiles(N);
  const bool exact = save && !compact, derive = save && compact;

  const int64_t scratch_tokens = tiles.slots() * tiles.tokens();
  const Tensor hidden = empty_like(x, {scratch_tokens, K});
  const Tensor y = empty_like(x, {N, D});
  const Tensor saved =
      save ? empty_like(x, {P, N, K}, derive ? ScalarType::BFloat16 : x.scalar_type()) : empty_like(x, {0});
  const Tensor counts =
      count ? torch::stable::new_zeros(x, {K}, ScalarType::Long) : empty_like(x, {0}, ScalarType::Long);
  Tensor second_scratch, lane_counts, lane_derivative;
  if (w_gate && !exact) second_scratch = empty_like(x, {scratch_tokens, K});
  if (count) lane_counts = torch::stable::new_zeros(x, {tiles.lanes(), K}, ScalarType::Int);
  if (derive) lane_derivative = empty_like(x, {tiles.lanes(), K});

  // Views are made here: a view made in another thread would be recorded by autograd.
  struct Views {
    Tensor x, first, second, hidden, y;  // first: what act sees; second: what a gated FFN multiplies act(first) with
  };
  std::vector<Views> views;
  for (const fedpft::Tile& tile : tiles) {
    const int64_t scratch = tile.slot * tiles.tokens();
    Views view{
        rows(x, tile.start, tile.tokens), {}, {}, rows(hidden, scratch, tile.tokens), rows(y, tile.start, tile.tokens)};
    view.first = exact ? rows(plane(saved, 0), tile.start, tile.tokens) : view.hidden;
    if (w_gate) {
      view.second = exact ? rows(plane(saved, 1), tile.start, tile.tokens) : rows(second_scratch, scratch, tile.tokens);
    }
    views.push_back(view);
  }
  const Tensor w_in_t = transposed(w_in), w_first_t = w_gate ? transposed(*w_gate) : w_in_t;
  const Optional bias_in = packed(b_in), bias_gate = packed(b_gate), valid = packed(mask);
  const Real* bias_first = data_or_null<Real>(w_gate ? bias_gate : bias_in);
  const Real* bias_second = data_or_null<Real>(bias_in);
  const bool* counted = data_or_null<bool>(valid);

  tiles.for_each([&](const fedpft::Tile& tile) {
    const Views& view = views[tile.index];
    multiply(view.first, view.x, w_first_t);
    if (w_gate) multiply(view.second, view.x, w_in_t);
    Real* const first = data<Real>(view.first);
    Real* const second = w_gate ? data<Real>(view.second) : nullptr;
    Real* const active = data<Real>(view.hidden);

    tiles.for_each_row(tile, [&](int64_t lane, int64_t t) {
      Real* z = first + t * K;
      Real* up = second ? second + t * K : nullptr;
      Real* h = active + t * K;
      if (bias_first) kernels.add(z, bias_first, K);
      if (up && bias_second) kernels.add(up, bias_second, K);
      unsigned short* kept = derive ? data<unsigned short>(saved) + (tile.start + t) * K : nullptr;
      if (kept) {
        Real* derivative = data<Real>(lane_derivative) + lane * K;
        kernels.differentiate(act, z, derivative, K);
        if (up) kernels.multiply(derivative, up, K);
        kernels.narrow(derivative, kept, K);
      }
      kernels.activate(act, z, h, K);
      if (kept && up) kernels.narrow(h, kept + N * K, K);
      if (count && (!counted || counted[tile.start + t])) {
        kernels.count_inactive(h, static_cast<Real>(eps), data<int>(lane_counts) + lane * K, K);
      }
      if (up) kernels.multiply(h, up, K);
    });

    if (b_out) {
      multiply_add(view.y, *b_out, view.hidden, w_out);
    } else {
      multiply(view.y, view.hidden, w_out);
    }
  });
  if (count) {
    int64_t* total = data<int64_t>(counts);
    const int* partial = data<int>(lane_counts);
    for (int64_t lane = 0; lane < tiles.lanes(); ++lane, partial += K) {
      for (int64_t j = 0; j < K; ++j) total[j] += partial[j];
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
  const Tensor grad_x = empty_like(grad_y, {N, D});
  const int64_t scratch_tokens = tiles.slots() * tiles.tokens();
  const Tensor grad_first = empty_like(grad_y, {scratch_tokens, K});
  Tensor grad_second, lane_active;
  if (w_gate) grad_second = empty_like(grad_y, {scratch_tokens, K});
  if (w_gate && !compact) lane_active = empty_like(grad_y, {tiles.lanes(), K});

  struct Views {
    Tensor grad_y, first, second, grad_x;
  };
  std::vector<Views> views;
  for (const fedpft::Tile& tile : tiles) {
    const int64_t scratch = tile.slot * tiles.tokens();
    Views view{
        rows(grad_y, tile.start, tile.tokens),
        rows(grad_first, scratch, tile.tokens),
        {},
        rows(grad_x, tile.start, tile.tokens)};
    if (w_gate) view.second = rows(grad_second, scratch, tile.tokens);
    views.push_back(view);
  }
  const Tensor kept = packed(saved), w_out_t = transposed(w_out);

  tiles.for_each([&](const fedpft::Tile& tile) {
    const Views& view = views[tile.index];
    multiply(view.first, view.grad_y, w_out_t);
    Real* const first_rows = data<Real>(view.first);
    Real* const second_rows = w_gate ? data<Real>(view.second) : nullptr;

    tiles.for_each_row(tile, [&](int64_t lane, int64_t t) {
      Real* first = first_rows + t * K;
      Real* second = second_rows ? second_rows + t * K : nullptr;
      if (second) std::copy(first, first + K, second);
      if (compact) {
        const unsigned short* derivative = data<unsigned short>(kept) + (tile.start + t) * K;
        kernels.multiply_bfloat16(first, derivative, K);
        if (second) kernels.multiply_bfloat16(second, derivative + N * K, K);
        return;
      }
      const Real* z = data<Real>(kept) + (tile.start + t) * K;
      kernels.multiply_derivative(act, z, first, K);
      if (second) {
        Real* active = data<Real>(lane_active) + lane * K;
        kernels.activate(act, z, active, K);
        kernels.multiply(second, active, K);
        kernels.multiply(first, z + N * K, K);
      }
    });

    if (w_gate) {
      multiply(view.grad_x, view.first, *w_gate);
      multiply_add(view.grad_x, view.grad_x, view.second, w_in);
    } else {
      multiply(view.grad_x, view.first, w_in);
    }
  });
  return grad_x;
}

std::tuple<Tensor, Tensor, Tensor> sub_ffn_cpu(
    Tensor x, Tensor w_in, Optional b_in, Optional w_gate, Optional b_gate, Tensor w_out, Optional b_out, Optional mask,
    std::string activation, double eps, bool count, bool save, bool compact) {
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
    Tensor grad_y, Tensor saved, Tensor w_in, Optional w_gate, Tensor w_out, std::string activation, bool compact) {
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
