// sub_ffn, sub_ffn_backward: a frozen FFN, or chosen neurons of one, whose activation never exists as a whole.
//
//   z = x W_in^T + b_in              y = act(z) W_out + b_out            dx = ((dy W_out^T) * act'(z)) W_in
//   gated: g = x W_gate^T + b_gate   y = (act(g) * z) W_out + b_out      dx = (dh * z * act'(g)) W_gate + (dh * act(g))
//   W_in counts[j] = tokens under the mask with |act(z_j)| <= eps (gated: act(g_j))
//
// Shapes: x, y (N, D); W_in, W_gate, W_out (F, D), neuron-major; biases (F,), (F,), (D,); neurons (K,) int64, or K =
//   F; counts (K,) int64; saved (P, N, K): pre-activations [g, z] or [z] in x's dtype, or, compact, the derivatives
//   of h by them in bfloat16.
// Accumulation: float32 (float64 for float64) throughout; y and dx grow block by block of neurons, in order. bfloat16
//   and float16 are widened as they are loaded (ffn.h; x and y a tile at a time), and results are rounded once: no
//   instruction set compiled here multiplies them any faster.
// Determinism: the same bits on every run with the same threads and instruction set; counts are sums of integers.
// Bytes moved: a tile of tokens meets a block of neurons in the second-level cache; z is written once (to `saved`, if
//   it is wanted) and read once beside the two multiplies; bias, activation, derivative and count work on a row that
//   is in the first-level cache.
// Parallel over tiles (tiles.h). Scratch: one tile by one block a thread, two in a gated FFN; in half types a tile of x
//   and y as well.
#include <torch/csrc/stable/library.h>

#include "ffn.h"

namespace fedpft {

// As they lie in memory, every one checked.
Optional packed_neurons(const Optional& neurons, int64_t rows) {
  if (!neurons) return std::nullopt;
  check(neurons, "neurons", ScalarType::Long, {neurons->numel()});
  const Tensor whole = packed(*neurons);
  for (int64_t j = 0; j < whole.numel(); ++j) {
    const int64_t row = data<int64_t>(whole)[j];
    if (row < 0 || row >= rows) {
      fail(
          "neurons: has ", std::to_string(row), " at position ", std::to_string(j), ", but the weights have rows 0 to ",
          std::to_string(rows - 1));
    }
  }
  return whole;
}

namespace {

template <class Real>
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& w_in, const Optional& b_in, const Optional& w_gate, const Optional& b_gate,
    const Tensor& w_out, const Optional& b_out, const Optional& neurons, const Optional& mask, Activation act,
    double eps, bool count, bool save, bool compact) {
  const RowKernels<Real>& kernels = row_kernels<Real>();
  const int64_t N = x.size(0), D = x.size(1), K = neurons ? neurons->size(0) : w_in.size(0), P = w_gate ? 2 : 1;
  const bool exact = save && !compact, derive = save && compact;
  const Tiles tiles(N);
  const NeuronBlocks<Real> blocks(w_in, w_gate, w_out, neurons, K);
  const int64_t widest = blocks.widest();

  const Tensor y = torch::stable::new_empty(x, {N, D});
  std::vector<int64_t> saved_shape = save ? std::vector<int64_t>{P, N, K} : std::vector<int64_t>{0};
  const Tensor saved = torch::stable::new_empty(x, saved_shape, derive ? ScalarType::BFloat16 : x.scalar_type());
  const Tensor counts = torch::stable::new_zeros(x, {count ? K : 0}, ScalarType::Long);
  const Tensor scratch_hidden = scratch<Real>(x, {tiles.wave_tokens(), widest});
  Optional scratch_second, lane_counts, lane_derivatives;
  if (w_gate) scratch_second = scratch<Real>(x, {tiles.wave_tokens(), widest});
  if (count) lane_counts = torch::stable::new_zeros(x, {tiles.lanes(), K}, ScalarType::Int);
  if (derive) lane_derivatives = scratch<Real>(x, {tiles.lanes(), widest});

  const TokenRows<Real> x_rows(x, tiles), y_rows(y, tiles);
  std::optional<SavedRows<Real>> saved_rows;
  if (save) saved_rows.emplace(saved);
  const bool in_place = exact && saved_rows->in_place();
  const Optional bias_in = widened<Real>(b_in, neurons), bias_gate = widened<Real>(b_gate, neurons);
  const Optional bias_out = widened<Real>(b_out, std::nullopt);
  const Optional packed_mask = mask ? Optional(packed(*mask)) : std::nullopt;
  const Real* const bias_first = data<Real>(w_gate ? bias_gate : bias_in);
  const Real* const bias_second = data<Real>(bias_in);
  const bool* const counted = data<bool>(packed_mask);
  int* const count_rows = data<int>(lane_counts);
  Real* const derivative_rows = data<Real>(lane_derivatives);
  const Matrix<Real> bias_row(data<Real>(bias_out), 1, D, D);

  blocks.for_each(tiles, [&](const Wave&, const Tile& tile, const NeuronBlock<Real>& block) {
    const int64_t k = block.first, n = block.count, position = tile.slot * tiles.tokens() * widest;
    if (block.is_first) x_rows.load(tile);
    // first: what act sees; second: what a gated FFN multiplies act(first) with; hidden: what W_out multiplies.
    const Matrix<Real> hidden(data<Real>(scratch_hidden) + position, tile.tokens, n, n);
    Matrix<Real> first = hidden, second;
    if (in_place) first = saved_rows->tile(0, tile, k, n);
    multiply(first, x_rows.tile(tile), (w_gate ? block.gate : block.in).transposed());
    if (w_gate) {
      second = {data<Real>(scratch_second) + position, tile.tokens, n, n};
      if (in_place) second = saved_rows->tile(1, tile, k, n);
      multiply(second, x_rows.tile(tile), block.in.transposed());
    }
    tiles.for_each_row(tile, [&](int64_t lane, int64_t t) {
      const int64_t token = tile.start + t;
      Real *z = first.row(t), *up = w_gate ? second.row(t) : nullptr, *h = hidden.row(t);
      if (bias_first) kernels.add(z, bias_first + k, n);
      if (up && bias_second) kernels.add(up, bias_second + k, n);
      if (exact && !in_place) {
        saved_rows->store(z, 0, token, k, n);
        if (up) saved_rows->store(up, 1, token, k, n);
      }
      if (derive) {
        Real* derivative = derivative_rows + lane * widest;
        kernels.differentiate(act, z, derivative, n);
        if (up) kernels.multiply(derivative, up, n);
        saved_rows->store(derivative, 0, token, k, n);
      }
      kernels.activate(act, z, h, n);
      if (derive && up) saved_rows->store(h, 1, token, k, n);
      if (count && (!counted || counted[token])) {
        kernels.count_inactive(h, static_cast<Real>(eps), count_rows + lane * K + k, n);
      }
      if (up) kernels.multiply(h, up, n);
    });
    const Matrix<Real> y_tile = y_rows.tile(tile);
    if (!block.is_first) {
      multiply_add(y_tile, y_tile, hidden, block.out);
    } else {
      b_out ? multiply_add(y_tile, bias_row, hidden, block.out) : multiply(y_tile, hidden, block.out);
    }
    if (block.is_last) y_rows.store(tile);
  });
  for (int64_t lane = 0; count && lane < tiles.lanes(); ++lane) {
    for (int64_t j = 0; j < K; ++j) data<int64_t>(counts)[j] += count_rows[lane * K + j];
  }
  return {y, saved, counts};
}

template <class Real>
Tensor backward(
    const Tensor& grad_y, const Tensor& saved, const Tensor& w_in, const Optional& w_gate, const Tensor& w_out,
    const Optional& neurons, Activation act, bool compact) {
  const RowKernels<Real>& kernels = row_kernels<Real>();
  const int64_t N = grad_y.size(0), D = grad_y.size(1), K = saved.size(2);
  const Tiles tiles(N);
  const NeuronBlocks<Real> blocks(w_in, w_gate, w_out, neurons, K);
  const int64_t widest = blocks.widest();
  const Tensor grad_x = torch::stable::new_empty(grad_y, {N, D}), kept = packed(saved);
  const Tensor scratch_first = scratch<Real>(grad_y, {tiles.wave_tokens(), widest});
  const Tensor lane_saved = scratch<Real>(grad_y, {tiles.lanes(), 2, widest});
  Optional scratch_second;
  if (w_gate) scratch_second = scratch<Real>(grad_y, {tiles.wave_tokens(), widest});
  const TokenRows<Real> grad_y_rows(grad_y, tiles), grad_x_rows(grad_x, tiles);
  const SavedRows<Real> saved_rows(kept);

  blocks.for_each(tiles, [&](const Wave&, const Tile& tile, const NeuronBlock<Real>& block) {
    const int64_t k = block.first, n = block.count, position = tile.slot * tiles.tokens() * widest;
    if (block.is_first) grad_y_rows.load(tile);
    // Both start as the gradient of the hidden value and become those of the two pre-activations.
    const Matrix<Real> first(data<Real>(scratch_first) + position, tile.tokens, n, n);
    Matrix<Real> second;
    if (w_gate) second = {data<Real>(scratch_second) + position, tile.tokens, n, n};
    multiply(first, grad_y_rows.tile(tile), block.out.transposed());
    tiles.for_each_row(tile, [&](int64_t lane, int64_t t) {
      const int64_t token = tile.start + t;
      Real *grad_first = first.row(t), *grad_second = w_gate ? second.row(t) : nullptr;
      if (compact) {
        if (grad_second) {
          std::copy(grad_first, grad_first + n, grad_second);
          kernels.multiply_bfloat16(grad_second, static_cast<unsigned short*>(saved_rows.at(1, token, k)), n);
        }
        kernels.multiply_bfloat16(grad_first, static_cast<unsigned short*>(saved_rows.at(0, token, k)), n);
        return;
      }
      Real* buffer = data<Real>(lane_saved) + lane * 2 * widest;
      const Real* z = saved_rows.load(0, token, k, n, buffer);
      const Real* up = w_gate ? saved_rows.load(1, token, k, n, buffer + widest) : nullptr;
      differentiate_row<Real>(act, z, up, grad_first, grad_second, nullptr, n, 0);
    });
    add_input_gradient(grad_x_rows.tile(tile), first, second, block);
    if (block.is_last) grad_x_rows.store(tile);
  });
  return grad_x;
}

Tensor sub_ffn_backward_cpu(
    Tensor grad_y, Tensor saved, Tensor w_in, Optional w_gate, Tensor w_out, Optional neurons, std::string activation,
    bool compact) {
  const ScalarType type = grad_y.scalar_type();
  if (grad_y.dim() != 2 || w_in.dim() != 2) fail("sub_ffn_backward: grad_y and w_in must have two dimensions");
  const int64_t N = grad_y.size(0), D = grad_y.size(1), F = w_in.size(0);
  const Optional chosen = packed_neurons(neurons, F);
  check(saved, "saved", compact ? ScalarType::BFloat16 : type, {w_gate ? 2 : 1, N, chosen ? chosen->size(0) : F});
  check(w_in, "w_in", type, {F, D});
  check(w_gate, "w_gate", type, {F, D});
  check(w_out, "w_out", type, {F, D});
  auto run = type == ScalarType::Double ? backward<double> : backward<float>;
  return run(grad_y, saved, w_in, w_gate, w_out, chosen, activation_of(activation, "sub_ffn"), compact);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sub_ffn_cpu(
    Tensor x, Tensor w_in, Optional b_in, Optional w_gate, Optional b_gate, Tensor w_out, Optional b_out,
    Optional neurons, Optional mask, std::string activation, double eps, bool count, bool save, bool compact) {
  const ScalarType type = x.scalar_type();
  if (x.dim() != 2 || w_in.dim() != 2) fail("sub_ffn: x and w_in must have two dimensions");
  const int64_t N = x.size(0), D = x.size(1), F = w_in.size(0);
  check(w_in, "w_in", type, {F, D});
  check(b_in, "b_in", type, {F});
  check(w_gate, "w_gate", type, {F, D});
  check(b_gate, "b_gate", type, {F});
  check(w_out, "w_out", type, {F, D});
  check(b_out, "b_out", type, {D});
  check(mask, "mask", ScalarType::Bool, {N});
  auto run = type == ScalarType::Double ? forward<double> : forward<float>;
  return run(
      x, w_in, b_in, w_gate, b_gate, w_out, b_out, packed_neurons(neurons, F), mask,
      activation_of(activation, "sub_ffn"), eps, count, save, compact);
}

}  // namespace fedpft

STABLE_TORCH_LIBRARY_IMPL(fedpft, CPU, m) {
  m.impl("sub_ffn", TORCH_BOX(&fedpft::sub_ffn_cpu));
  m.impl("sub_ffn_backward", TORCH_BOX(&fedpft::sub_ffn_backward_cpu));
}
