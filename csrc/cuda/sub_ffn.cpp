// sub_ffn, sub_ffn_train, their backwards and activation_moments on CUDA. Formulas and shapes are those of
// csrc/cpu/sub_ffn.cpp and csrc/cpu/activation_moments.cpp.
//
// Who multiplies: the first multiply of each direction, with bias, activation, derivative and count in its epilogue, is
//   one of ffn_gemm.h's where it is asked for and types, shapes and the GPU allow it (fused() below), else ATen's,
//   followed by one pass of sub_ffn.cu. Every other multiply is ATen's, through the dispatcher, so cuBLAS runs it on
//   the current stream and nothing here links a CUDA build of torch. Only `out` variants are called: autocast leaves
//   them alone.
// Accumulation: float32 (float64 for float64). Rounding to a half type: the hidden value, y, and z where it is kept or
//   ATen multiplied; over a set of neurons y and grad_x once more per further block.
// A set of neurons is gathered kBlock rows at a time, so scratch for weights is 2 (gated 3) x kBlock x D elements,
//   whatever F and K; hidden scratch is (N, kBlock). A usual sub-FFN is one block. ATen's index_select asserts on the
//   device that the indices are within bounds.
// Memory of a dense call beside its outputs: (N, K) for the hidden value, gated (N, K) more; backward (N, K) a
// gradient. Nothing waits for the GPU, and all memory belongs to the call: calls on several streams do not meet, and a
// CUDA graph
//   can capture them.
#include "sub_ffn.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ffn_gemm.h"
#include "launchers.h"
#include "stream.h"

namespace {

using fedpft::Activation;
using fedpft::activation_of;
using fedpft::Element;
using fedpft::cuda::Stream;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kBlock = 2048;       // neurons gathered at once
constexpr int64_t kTokensHeld = 2048;  // of activation_moments
constexpr int64_t kPanel = 1024;       // rows of the triangle that it multiplies at once

// ------------------------------------------------------------------------------------------------ tensors

template <class... Arguments>
void call(const char* operation, const char* overload, const Arguments&... arguments) {
  StableIValue stack[] = {torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(operation, overload, stack, TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // every operation here returns one tensor, which must be released
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// out = a b
void multiply(const Tensor& out, const Tensor& a, const Tensor& b) { call("aten::mm", "out", a, b, out); }

// out = a b + addend, which is a row or, to add to what is there, out itself. aten::addmm takes numbers that the stable
// dispatcher cannot pass; aten::linear hands its bias to the same multiply.
void multiply_add(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& addend) {
  call("aten::linear", "out", a, transposed(b), Optional(addend), out);
}

Tensor rows(const Tensor& tensor, int64_t first, int64_t count) {
  return torch::stable::narrow(const_cast<Tensor&>(tensor), 0, first, count);
}

Tensor columns(const Tensor& matrix, int64_t first, int64_t count) {
  return torch::stable::narrow(const_cast<Tensor&>(matrix), 1, first, count);
}

Tensor gathered(const Tensor& from, const Tensor& neurons) {
  StableIValue stack[] = {
      torch::stable::detail::from(from), torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(neurons)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Optional gathered(const Optional& from, const Tensor& neurons) {
  return from ? Optional(gathered(*from, neurons)) : std::nullopt;
}

Tensor empty(const Tensor& like, std::vector<int64_t> shape, std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(like, shape, type);
}

Tensor packed(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

Optional packed(const Optional& tensor) { return tensor ? Optional(packed(*tensor)) : std::nullopt; }

void* data(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

void* data(const Optional& tensor) { return tensor ? data(*tensor) : nullptr; }

// The wrappers check with better words; this keeps a direct call inside its tensors.
void check(
    const Optional& tensor, const char* name, ScalarType type, const std::vector<int64_t>& shape, const Tensor& like) {
  if (!tensor) return;
  bool fits = tensor->scalar_type() == type && tensor->dim() == static_cast<int64_t>(shape.size()) &&
              tensor->get_device_index() == like.get_device_index();
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = tensor->size(d) == shape[d];
  if (!fits) fedpft::fail("sub_ffn: ", name, " has a wrong shape, dtype or device");
}

struct Weights {
  Tensor in;
  Optional b_in, gate, b_gate;
  Tensor out;

  bool gated() const { return gate.has_value(); }
  int64_t size() const { return in.size(0); }
  Weights chosen(const Tensor& neurons) const {
    return {
        gathered(in, neurons), gathered(b_in, neurons), gathered(gate, neurons), gathered(b_gate, neurons),
        gathered(out, neurons)};
  }
  // The first `count` neurons, as views, without biases.
  Weights first(int64_t count) const {
    return {
        rows(in, 0, count), std::nullopt, gate ? Optional(rows(*gate, 0, count)) : std::nullopt, std::nullopt,
        rows(out, 0, count)};
  }
};

// body(weights, first, count) for every block of neurons: one with the weights themselves if all neurons are used. At
// least once, so that a set of none writes y as well.
template <class Body>
void for_each_block(const Weights& weights, const Optional& neurons, const Body& body) {
  if (!neurons) return body(weights, int64_t{0}, weights.size());
  const int64_t K = neurons->size(0);
  int64_t first = 0;
  do {
    const int64_t count = std::min(kBlock, K - first);
    body(weights.chosen(rows(*neurons, first, count)), first, count);
    first += count;
  } while (first < K);
}

// ------------------------------------------------------------------------------------------------ fused multiplies

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Rows are contiguous, and each starts at a multiple of 16 bytes.
bool fits_vectors(const Tensor& matrix) {
  return matrix.stride(1) == 1 && matrix.stride(0) % 8 == 0 && matrix.stride(0) >= matrix.size(1) &&
         is_aligned(data(matrix));
}

// The fused multiplies for a call, or null: half types, on a GPU that they were built for, D and K multiples of 8, rows
// contiguous and aligned, biases aligned. ld_saved: the row distance of what is kept.
const fedpft::cuda::FfnGemms* fused(
    const Tensor& x, const std::vector<Optional>& weights, const std::vector<Optional>& biases, int64_t K,
    int64_t ld_saved, const void* saved) {
  constexpr int64_t kMost = std::numeric_limits<int>::max() - 1024;  // they count in int, and round up to tiles
  const int64_t N = x.size(0), D = x.size(1);
  if (x.scalar_type() != ScalarType::BFloat16 && x.scalar_type() != ScalarType::Half) return nullptr;
  if (N == 0 || K == 0 || D == 0 || N > kMost || K > kMost || D > kMost) return nullptr;
  if (K % 8 != 0 || D % 8 != 0 || ld_saved % 8 != 0 || !is_aligned(saved) || !fits_vectors(x)) return nullptr;
  for (const Optional& weight : weights) {
    if (weight && !fits_vectors(*weight)) return nullptr;
  }
  for (const Optional& bias : biases) {
    if (bias && !is_aligned(data(*bias))) return nullptr;
  }
  return fedpft::cuda::ffn_gemms(fedpft::cuda::element_of(x, "sub_ffn"));
}

void check_gemm(const char* error) {
  if (error != nullptr) fedpft::fail("sub_ffn: fused multiply: ", error);
}

// ------------------------------------------------------------------------------------------------ forward

struct Forward {
  const Tensor& x;
  Activation activation;
  double eps;
  bool exact, compact;     // what is kept, if anything
  const Tensor& saved;     // (P, N, K) or empty
  const Optional& counts;  // (K,)
  const Optional& mask;    // (N,)
  int64_t K;
  cudaStream_t stream;

  // Projection `p` of the kept values at neuron `first`; null if nothing is kept.
  void* saved_at(int64_t p, int64_t first) const {
    if (!exact && !compact) return nullptr;
    const int64_t bytes = static_cast<int64_t>(saved.element_size());
    return static_cast<char*>(data(saved)) + (p * x.size(0) * K + first) * bytes;
  }
  int64_t* counts_at(int64_t first) const { return counts ? static_cast<int64_t*>(data(*counts)) + first : nullptr; }

  Tensor hidden(const Weights& weights, int64_t first, int64_t count) const {
    const auto* gemms =
        fused(x, {weights.in, weights.gate}, {weights.b_in, weights.b_gate}, count, K, saved_at(0, first));
    return gemms ? with_fused(*gemms, weights, first, count) : with_pass(weights, first, count);
  }

  Tensor with_fused(const fedpft::cuda::FfnGemms& gemms, const Weights& weights, int64_t first, int64_t count) const {
    const Tensor hidden = empty(x, {x.size(0), count});
    const Optional bias_in = packed(weights.b_in), bias_gate = packed(weights.b_gate);
    fedpft::cuda::ForwardGemm g = {};
    g.N = static_cast<int>(x.size(0)), g.K = static_cast<int>(count), g.D = static_cast<int>(x.size(1));
    g.x = data(x), g.ld_x = x.stride(0), g.ld_saved = K, g.ld_hidden = count;
    g.mask = static_cast<const bool*>(data(mask)), g.counts = counts_at(first);
    g.activation = activation, g.eps = static_cast<float>(eps), g.compact = compact;
    Optional gate;
    if (weights.gated()) {
      // The gate's pre-activation is kept where it is wanted, else in scratch.
      if (!exact) gate = empty(x, {x.size(0), count});
      g.w = data(weights.gate), g.ld_w = weights.gate->stride(0), g.bias = data(bias_gate), g.linear = true;
      g.hidden = exact ? saved_at(0, first) : data(gate), g.ld_hidden = exact ? K : count;
      check_gemm(gemms.forward(g, stream));
      g.gate = g.hidden, g.ld_gate = g.ld_hidden, g.ld_hidden = count, g.linear = false, g.counts = nullptr;
    }
    g.w = data(weights.in), g.ld_w = weights.in.stride(0), g.bias = data(bias_in), g.hidden = data(hidden);
    g.saved_first = saved_at(weights.gated() && exact ? 1 : 0, first);
    g.saved_second = weights.gated() && compact ? saved_at(1, first) : nullptr;
    check_gemm(gemms.forward(g, stream));
    return hidden;
  }

  Tensor with_pass(const Weights& weights, int64_t first, int64_t count) const {
    const Tensor hidden = empty(x, {x.size(0), count});
    const auto z = [&](int64_t p, const Tensor& weight, const Optional& bias, const Tensor& scratch) {
      const Tensor out = exact ? columns(torch::stable::select(saved, 0, p), first, count) : scratch;
      bias ? multiply_add(out, x, transposed(weight), *bias) : multiply(out, x, transposed(weight));
      return out;
    };
    const Tensor z_first =
        weights.gated() ? z(0, *weights.gate, weights.b_gate, hidden) : z(0, weights.in, weights.b_in, hidden);
    Optional z_second;
    if (weights.gated()) {
      z_second = z(1, weights.in, weights.b_in, exact ? hidden : empty(x, {x.size(0), count}));
    }
    fedpft::cuda::ForwardPass pass = {};
    pass.element = fedpft::cuda::element_of(x, "sub_ffn"), pass.activation = activation;
    pass.N = x.size(0), pass.K = count;
    pass.first = data(z_first), pass.second = data(z_second), pass.ld_z = exact ? K : count;
    pass.hidden = data(hidden);
    pass.derivative_first = compact ? saved_at(0, first) : nullptr;
    pass.derivative_second = compact && weights.gated() ? saved_at(1, first) : nullptr, pass.ld_saved = K;
    pass.counts = counts_at(first), pass.mask = static_cast<const bool*>(data(mask)), pass.eps = eps;
    fedpft::cuda::check(fedpft_sub_ffn_forward(&pass, stream), "sub_ffn");
    return hidden;
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Weights& weights, const Optional& b_out, const Optional& neurons, const Optional& mask,
    const std::string& activation, double eps, bool count, bool save, bool compact) {
  if (x.dim() != 2 || weights.in.dim() != 2) fedpft::fail("sub_ffn: x and w_in must have two dimensions");
  const int64_t N = x.size(0), D = x.size(1), F = weights.size();
  const ScalarType type = x.scalar_type();
  check(weights.in, "w_in", type, {F, D}, x);
  check(weights.b_in, "b_in", type, {F}, x);
  check(weights.gate, "w_gate", type, {F, D}, x);
  check(weights.b_gate, "b_gate", type, {F}, x);
  check(weights.out, "w_out", type, {F, D}, x);
  check(b_out, "b_out", type, {D}, x);
  check(mask, "mask", ScalarType::Bool, {N}, x);
  if (neurons) check(neurons, "neurons", ScalarType::Long, {neurons->numel()}, x);
  const int64_t K = neurons ? neurons->size(0) : F, P = weights.gated() ? 2 : 1;

  const Stream stream(x);
  const Tensor y = empty(x, {N, D});
  const Tensor saved = save ? empty(x, {P, N, K}, compact ? ScalarType::BFloat16 : type) : empty(x, {0});
  const Optional counts = count ? Optional(torch::stable::new_zeros(x, {K}, ScalarType::Long)) : std::nullopt;
  const Optional counted = packed(mask);
  const Forward pass{
      x,     activation_of(activation, "sub_ffn"), eps, save && !compact, save && compact, saved, counts, counted, K,
      stream};
  for_each_block(weights, neurons, [&](const Weights& block, int64_t first, int64_t size) {
    const Tensor hidden = pass.hidden(block, first, size);
    if (first > 0) return multiply_add(y, hidden, block.out, y);
    b_out ? multiply_add(y, hidden, block.out, *b_out) : multiply(y, hidden, block.out);
  });
  return {y, saved, counts ? *counts : empty(x, {0}, ScalarType::Long)};
}

// ------------------------------------------------------------------------------------------------ backward

struct Gradients {
  Tensor first;     // (N, K): of the pre-activation that the activation sees
  Optional second;  // (N, K): gated, of what it is multiplied with

  const Tensor& in() const { return second ? *second : first; }
};

// Of the pre-activations of `weights`, whose kept values begin at `saved` (P, N, ld) in projection and row.
Gradients grad_z(
    const Tensor& grad_y, const Weights& weights, const Tensor& saved, int64_t first, Activation activation,
    bool compact, cudaStream_t stream) {
  const int64_t N = grad_y.size(0), K = weights.size(), ld = saved.size(2);
  const Tensor kept = columns(torch::stable::select(saved, 0, 0), first, K);
  Optional kept_second;
  Gradients grad = {empty(grad_y, {N, K}), std::nullopt};
  if (weights.gated()) {
    kept_second = columns(torch::stable::select(saved, 0, 1), first, K);
    grad.second = empty(grad_y, {N, K});
  }
  const auto* gemms = fused(grad_y, {weights.out}, {}, K, ld, data(kept));
  if (gemms) {
    fedpft::cuda::BackwardGemm g = {};
    g.N = static_cast<int>(N), g.K = static_cast<int>(K), g.D = static_cast<int>(grad_y.size(1));
    g.grad_y = data(grad_y), g.ld_grad_y = grad_y.stride(0), g.w_out = data(weights.out);
    g.ld_w_out = weights.out.stride(0);
    g.saved_first = data(kept), g.saved_second = data(kept_second), g.ld_saved = ld;
    g.grad_first = data(grad.first), g.grad_second = data(grad.second);
    g.activation = activation, g.compact = compact;
    check_gemm(gemms->backward(g, stream));
    return grad;
  }
  multiply(grad.first, grad_y, transposed(weights.out));
  fedpft::cuda::BackwardPass pass = {};
  pass.element = fedpft::cuda::element_of(grad_y, "sub_ffn_backward"), pass.activation = activation;
  pass.N = N, pass.K = K, pass.grad_hidden = data(grad.first);
  pass.saved_first = data(kept), pass.saved_second = data(kept_second), pass.ld_saved = ld, pass.compact = compact;
  pass.grad_first = data(grad.first), pass.grad_second = data(grad.second);
  fedpft::cuda::check(fedpft_sub_ffn_backward(&pass, stream), "sub_ffn_backward");
  return grad;
}

void add_grad_x(const Tensor& grad_x, const Gradients& grad, const Weights& weights, bool started) {
  started ? multiply_add(grad_x, grad.in(), weights.in, grad_x) : multiply(grad_x, grad.in(), weights.in);
  if (weights.gated()) multiply_add(grad_x, grad.first, *weights.gate, grad_x);
}

void check_backward(const Tensor& grad_y, const Tensor& saved, const Weights& weights, int64_t K, bool compact) {
  if (grad_y.dim() != 2 || weights.in.dim() != 2) {
    fedpft::fail("sub_ffn_backward: grad_y and w_in must have two dimensions");
  }
  const int64_t N = grad_y.size(0), D = grad_y.size(1), F = weights.size(), P = weights.gated() ? 2 : 1;
  const ScalarType type = grad_y.scalar_type();
  check(saved, "saved", compact ? ScalarType::BFloat16 : type, {P, N, K}, grad_y);
  check(weights.in, "w_in", type, {F, D}, grad_y);
  check(weights.gate, "w_gate", type, {F, D}, grad_y);
  check(weights.out, "w_out", type, {F, D}, grad_y);
}

// ------------------------------------------------------------------------------------------------ operators

std::tuple<Tensor, Tensor, Tensor> sub_ffn(
    Tensor x, Tensor w_in, Optional b_in, Optional w_gate, Optional b_gate, Tensor w_out, Optional b_out,
    Optional neurons, Optional mask, std::string activation, double eps, bool count, bool save, bool compact) {
  const Weights weights{w_in, b_in, w_gate, b_gate, w_out};
  return forward(x, weights, b_out, neurons, mask, activation, eps, count, save, compact);
}

Tensor sub_ffn_backward(
    Tensor grad_y, Tensor saved, Tensor w_in, Optional w_gate, Tensor w_out, Optional neurons, std::string activation,
    bool compact) {
  const Weights weights{w_in, std::nullopt, w_gate, std::nullopt, w_out};
  if (neurons) check(neurons, "neurons", ScalarType::Long, {neurons->numel()}, grad_y);
  check_backward(grad_y, saved, weights, neurons ? neurons->size(0) : weights.size(), compact);
  const Stream stream(grad_y);
  const Activation act = activation_of(activation, "sub_ffn");
  const Tensor grad_x = empty(grad_y, {grad_y.size(0), grad_y.size(1)}), kept = packed(saved);
  for_each_block(weights, neurons, [&](const Weights& block, int64_t first, int64_t) {
    add_grad_x(grad_x, grad_z(grad_y, block, kept, first, act, compact, stream), block, first > 0);
  });
  return grad_x;
}

std::tuple<Tensor, Tensor> sub_ffn_train(
    Tensor x, Tensor w_in, Optional b_in, Optional w_gate, Optional b_gate, Tensor w_out, Optional b_out, Tensor,
    Optional, Optional, Optional, Tensor, std::string activation, bool save) {
  const Weights weights{w_in, b_in, w_gate, b_gate, w_out};
  auto [y, saved, counts] = forward(x, weights, b_out, std::nullopt, std::nullopt, activation, 0.0, false, save, false);
  return {y, saved};
}

// Hidden values of the first U neurons once more, from what was kept: (N, U).
Tensor hidden_again(const Tensor& x, const Tensor& saved, int64_t U, Activation activation, cudaStream_t stream) {
  const Tensor hidden = empty(x, {x.size(0), U});
  fedpft::cuda::ForwardPass pass = {};
  pass.element = fedpft::cuda::element_of(x, "sub_ffn_train_backward"), pass.activation = activation;
  pass.N = x.size(0), pass.K = U, pass.first = data(torch::stable::select(saved, 0, 0));
  if (saved.size(0) == 2) pass.second = data(torch::stable::select(saved, 0, 1));
  pass.ld_z = saved.size(2), pass.hidden = data(hidden);
  fedpft::cuda::check(fedpft_sub_ffn_forward(&pass, stream), "sub_ffn_train_backward");
  return hidden;
}

// Column sums; ATen adds half types in float32, in an order that depends on the shape alone.
Tensor column_sums(const Tensor& matrix) {
  Tensor sums = empty(matrix, {matrix.size(1)});
  const int64_t dimension[] = {0};
  torch::stable::sum_out(sums, matrix, torch::headeronly::IntHeaderOnlyArrayRef(dimension, 1));
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sub_ffn_train_backward(
    Tensor grad_y, Tensor x, Tensor saved, Tensor w_in, Optional w_gate, Tensor w_out, int64_t updated,
    std::string activation, bool input_grad) {
  const Weights weights{w_in, std::nullopt, w_gate, std::nullopt, w_out};
  const int64_t K = weights.size(), U = updated;
  check_backward(grad_y, saved, weights, K, false);
  check(x, "x", grad_y.scalar_type(), {grad_y.size(0), grad_y.size(1)}, grad_y);
  if (U < 0 || U > K) {
    fedpft::fail("sub_ffn_train_backward: updated must be between 0 and the number of neurons");
  }
  const Stream stream(grad_y);
  const Activation act = activation_of(activation, "sub_ffn");
  const Tensor kept = packed(saved);
  const Weights reached = input_grad ? weights : weights.first(U);
  const Gradients grad = grad_z(grad_y, reached, kept, 0, act, false, stream);

  const auto weight_gradient = [&](const Tensor& grad_rows, const Tensor& values) {
    const Tensor gradient = empty(values, {U, values.size(1)});
    multiply(gradient, transposed(grad_rows), values);
    return gradient;
  };
  const auto none = [&] { return empty(grad_y, {0}); };
  const Tensor grad_x = input_grad ? empty(grad_y, {x.size(0), x.size(1)}) : none();
  if (input_grad) add_grad_x(grad_x, grad, weights, false);
  const Tensor grad_in = columns(grad.in(), 0, U);
  const Tensor grad_out = weight_gradient(hidden_again(x, kept, U, act, stream), grad_y);
  Tensor grad_gate = none(), grad_b_gate = none();
  if (weights.gated()) {
    const Tensor grad_first = columns(grad.first, 0, U);
    grad_gate = weight_gradient(grad_first, x);
    grad_b_gate = column_sums(grad_first);
  }
  return {grad_x,   weight_gradient(grad_in, x), column_sums(grad_in), grad_gate, grad_b_gate,
          grad_out, column_sums(grad_y)};
}

// Adds the products of values (n, F), float64, to the upper triangle of second (F, F), a panel of rows at a time.
void add_products(const Tensor& second, const Tensor& values, cudaStream_t stream) {
  const int64_t F = values.size(1);
  for (int64_t first = 0; first < F; first += kPanel) {
    const int64_t count = std::min(kPanel, F - first);
    const Tensor product = empty(values, {count, F - first});
    multiply(product, transposed(columns(values, first, count)), columns(values, first, F - first));
    double* diagonal = static_cast<double*>(data(second)) + first * F + first;
    fedpft::cuda::check(
        fedpft::cuda::fedpft_activation_products(
            static_cast<const double*>(data(product)), count, F - first, diagonal, F, stream),
        "activation_moments");
  }
}

// Beside the sums: kTokensHeld x F values twice, of x's type and of float64, and kPanel x F products.
void activation_moments(
    Tensor total, Tensor second, Tensor x, Tensor w_in, Optional b_in, Optional w_gate, Optional b_gate,
    Optional shares, Optional mask, std::string activation) {
  constexpr const char* name = "activation_moments";
  if (x.dim() != 2 || w_in.dim() != 2) fedpft::fail("activation_moments: x and w_in must have two dimensions");
  const int64_t N = x.size(0), D = x.size(1), F = w_in.size(0);
  const ScalarType type = x.scalar_type();
  const bool products = second.dim() == 2;
  check(total, "total", ScalarType::Double, {F}, x);
  check(second, "second", ScalarType::Double, products ? std::vector<int64_t>{F, F} : std::vector<int64_t>{F}, x);
  if (!total.is_contiguous() || !second.is_contiguous()) {
    fedpft::fail("activation_moments: total and second must be contiguous");
  }
  check(w_in, "w_in", type, {F, D}, x);
  check(b_in, "b_in", type, {F}, x);
  check(w_gate, "w_gate", type, {F, D}, x);
  check(b_gate, "b_gate", type, {F}, x);
  check(shares, "shares", type == ScalarType::Double ? type : ScalarType::Float, {N}, x);
  check(mask, "mask", ScalarType::Bool, {N}, x);
  const Weights weights{w_in, b_in, w_gate, b_gate, w_in};  // there is no output projection: never looked at
  const Activation act = activation_of(activation, name);
  const Stream stream(x);
  const Tensor nothing = empty(x, {0});
  const Optional none;
  for (int64_t start = 0; start < N && F > 0; start += kTokensHeld) {
    const int64_t count = std::min(kTokensHeld, N - start);
    const Tensor given = rows(x, start, count);
    const Forward forward{given, act, 0.0, false, false, nothing, none, none, F, stream};
    const Tensor hidden = forward.hidden(weights, 0, F);
    const Optional values = products ? Optional(empty(x, {count, F}, ScalarType::Double)) : none;
    const Optional own_shares = shares ? Optional(rows(*shares, start, count)) : none;
    const Optional own_mask = mask ? Optional(rows(*mask, start, count)) : none;
    fedpft::cuda::ActivationMoments pass = {};
    pass.element = fedpft::cuda::element_of(x, name), pass.hidden = data(hidden);
    pass.tokens = count, pass.neurons = F;
    pass.mask = static_cast<const bool*>(data(own_mask)), pass.mask_stride = mask ? mask->stride(0) : 0;
    pass.shares = data(own_shares), pass.shares_stride = shares ? shares->stride(0) : 0;
    pass.values = static_cast<double*>(data(values)), pass.total = static_cast<double*>(data(total));
    pass.squares = products ? nullptr : static_cast<double*>(data(second));
    fedpft::cuda::check(fedpft::cuda::fedpft_activation_moments(&pass, stream), name);
    if (values) add_products(second, *values, stream);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FEDPFT_LIBRARY, CUDA, m) {
  m.impl("sub_ffn", TORCH_BOX(&sub_ffn));
  m.impl("sub_ffn_backward", TORCH_BOX(&sub_ffn_backward));
  m.impl("sub_ffn_train", TORCH_BOX(&sub_ffn_train));
  m.impl("sub_ffn_train_backward", TORCH_BOX(&sub_ffn_train_backward));
  m.impl("activation_moments", TORCH_BOX(&activation_moments));
}
