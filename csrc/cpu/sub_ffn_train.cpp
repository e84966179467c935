// sub_ffn_train, sub_ffn_train_backward: an FFN of which the first U neurons and the output bias train.
//
//   forward as in sub_ffn.cpp; with dh = dy W_out^T, d1 the gradient of what act sees and d2 that of what a gated FFN
//   multiplies it with:
//   plain: d1 = dh * act'(z)         gated: d1 = dh * z * act'(g), d2 = dh * act(g)
//   dW_in = (d2 or d1)^T x   dW_gate = d1^T x   db = sums of d1, d2 over tokens   dW_out = h^T dy   db_out = sum of dy
//   dx = d1 W_gate + d2 W_in, or d1 W_in
//
// Shapes: x, y, dy, dx (N, D); W (K, D), neuron-major; dW (U, D), db (U,), db_out (D,); saved (P, N, K): [g, z] or
//   [z]. The updated neurons stand first, so their rows are a view. Without a gradient of x the other neurons are not
//   read.
// Accumulation: float32 (float64 for float64), weight gradients over the tokens wave by wave, in order; rounded once.
// Determinism: the same bits on every run with the same threads and instruction set. A row of dW belongs to one
//   thread.
// Bytes moved: as sub_ffn.cpp; d1, d2 and h of a wave of tokens by a block of neurons stay in cache from the row
//   loops to the products with x and dy. h is computed again from z, for the updated neurons only.
// Parallel over tiles of a wave for d1, d2, h and dx, then over the updated neurons of the block for dW and db.
// Scratch: two waves by a block, three in a gated FFN.
#include <torch/csrc/stable/library.h>

#include "ffn.h"

namespace fedpft {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The gradient of an (U, D) weight or, with D = 1, of a bias; empty if it is not there.
template <class Real>
struct Gradient {
  Tensor sum;
  Matrix<Real> rows;

  Gradient(const Tensor& like, int64_t count, int64_t columns)
      : sum(torch::stable::new_zeros(like, {count, columns}, kScalarType<Real>)), rows(sum) {}

  // rows first to first + count of the gradient += (columns `from` to `from` + count of left)^T right
  void add(int64_t first, const Matrix<Real>& left, int64_t from, int64_t count, const Matrix<Real>& right) const {
    const Matrix<Real> to = rows.slice(first, count);
    multiply_add(to, to, left.transposed().slice(from, count), right);
  }

  Tensor result(ScalarType type, std::vector<int64_t> shape) const {
    return torch::stable::to(torch::stable::view(sum, shape), type);
  }
};

template <class Real>
Gradients backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& saved, const Tensor& w_in, const Optional& w_gate,
    const Tensor& w_out, int64_t U, Activation act, bool input_grad) {
  const int64_t N = x.size(0), D = x.size(1), K = w_in.size(0);
  const Tiles tiles(N);
  const NeuronBlocks<Real> blocks(w_in, w_gate, w_out, std::nullopt, input_grad ? K : U, U);
  const int64_t widest = blocks.widest(), wave_tokens = tiles.wave_tokens();
  const Tensor kept = packed(saved), scratch_first = scratch<Real>(x, {wave_tokens, widest});
  const Tensor scratch_hidden = scratch<Real>(x, {wave_tokens, widest});
  const Tensor lane_saved = scratch<Real>(x, {tiles.lanes(), 2, widest});
  Optional scratch_second;
  if (w_gate) scratch_second = scratch<Real>(x, {wave_tokens, widest});
  const Tensor ones = scratch<Real>(x, {wave_tokens, 1});
  std::fill(data<Real>(ones), data<Real>(ones) + wave_tokens, Real(1));

  const ScalarType type = x.scalar_type();
  const Tensor grad_x = torch::stable::new_empty(x, input_grad ? std::vector<int64_t>{N, D} : std::vector<int64_t>{0});
  const int64_t gated = w_gate ? U : 0;
  const Gradient<Real> grad_in(x, U, D), grad_b_in(x, U, 1), grad_gate(x, gated, D), grad_b_gate(x, gated, 1);
  const Gradient<Real> grad_out(x, U, D), grad_b_out(x, D, 1);
  const TokenRows<Real> x_rows(x, tiles), grad_y_rows(grad_y, tiles);
  std::optional<TokenRows<Real>> grad_x_rows;
  if (input_grad) grad_x_rows.emplace(grad_x, tiles);
  const SavedRows<Real> saved_rows(kept);

  const auto differentiate = [&](const Wave&, const Tile& tile, const NeuronBlock<Real>& block) {
    const int64_t k = block.first, n = block.count, updated = k < U ? n : 0;
    const int64_t position = tile.slot * tiles.tokens() * n;  // without gaps: the wave is one matrix, too
    if (block.is_first) x_rows.load(tile), grad_y_rows.load(tile);
    const Matrix<Real> first(data<Real>(scratch_first) + position, tile.tokens, n, n);
    const Matrix<Real> hidden(data<Real>(scratch_hidden) + position, tile.tokens, n, n);
    Matrix<Real> second;
    if (w_gate) second = {data<Real>(scratch_second) + position, tile.tokens, n, n};
    multiply(first, grad_y_rows.tile(tile), block.out.transposed());
    tiles.for_each_row(tile, [&](int64_t lane, int64_t t) {
      Real* buffer = data<Real>(lane_saved) + lane * 2 * widest;
      const Real* z = saved_rows.load(0, tile.start + t, k, n, buffer);
      const Real* up = w_gate ? saved_rows.load(1, tile.start + t, k, n, buffer + widest) : nullptr;
      differentiate_row(act, z, up, first.row(t), w_gate ? second.row(t) : nullptr, hidden.row(t), n, updated);
    });
    if (!input_grad) return;
    add_input_gradient(grad_x_rows->tile(tile), first, second, block);
    if (block.is_last) grad_x_rows->store(tile);
  };

  const auto add_weight_gradients = [&](const Wave& wave, const NeuronBlock<Real>& block) {
    if (block.first >= U && !block.is_first) return;
    const int64_t n = block.first < U ? block.count : 0;
    const auto whole = [&](const Tensor& memory) { return Matrix<Real>(data<Real>(memory), wave.tokens, n, n); };
    const Matrix<Real> first = whole(scratch_first), hidden = whole(scratch_hidden);
    const Matrix<Real> up = w_gate ? whole(*scratch_second) : first;
    const Matrix<Real> x_wave = x_rows.wave(wave), grad_y_wave = grad_y_rows.wave(wave);
    const Matrix<Real> one(data<Real>(ones), wave.tokens, 1, 1);
    tiles.for_each_share([&](int64_t share, int64_t shares) {
      const int64_t from = n * share / shares, count = n * (share + 1) / shares - from, to = block.first + from;
      if (count > 0) {
        grad_in.add(to, up, from, count, x_wave), grad_b_in.add(to, up, from, count, one);
        grad_out.add(to, hidden, from, count, grad_y_wave);
        if (w_gate) grad_gate.add(to, first, from, count, x_wave), grad_b_gate.add(to, first, from, count, one);
      }
      if (block.is_first) {
        const int64_t column = D * share / shares;
        grad_b_out.add(column, grad_y_wave, column, D * (share + 1) / shares - column, one);
      }
    });
  };
  blocks.for_each(tiles, differentiate, add_weight_gradients);

  const std::vector<int64_t> gate_shape = w_gate ? std::vector<int64_t>{U, D} : std::vector<int64_t>{0};
  return {
      grad_x,
      grad_in.result(type, {U, D}),
      grad_b_in.result(type, {U}),
      grad_gate.result(type, gate_shape),
      grad_b_gate.result(type, {gated}),
      grad_out.result(type, {U, D}),
      grad_b_out.result(type, {D})};
}

std::tuple<Tensor, Tensor> sub_ffn_train_cpu(
    Tensor x, Tensor w_in, Optional b_in, Optional w_gate, Optional b_gate, Tensor w_out, Optional b_out, Tensor,
    Optional, Optional, Optional, Tensor, std::string activation, bool save) {
  auto [y, saved, counts] = sub_ffn_cpu(
      x, w_in, b_in, w_gate, b_gate, w_out, b_out, std::nullopt, std::nullopt, activation, 0.0, false, save, false);
  return {y, saved};
}

Gradients sub_ffn_train_backward_cpu(
    Tensor grad_y, Tensor x, Tensor saved, Tensor w_in, Optional w_gate, Tensor w_out, int64_t updated,
    std::string activation, bool input_grad) {
  const ScalarType type = x.scalar_type();
  if (x.dim() != 2 || w_in.dim() != 2) fail("sub_ffn_train_backward: x and w_in must have two dimensions");
  const int64_t N = x.size(0), D = x.size(1), K = w_in.size(0);
  if (updated < 0 || updated > K) {
    fail("sub_ffn_train_backward: updated must be 0 to ", std::to_string(K), ", not ", std::to_string(updated));
  }
  check(grad_y, "grad_y", type, {N, D});
  check(saved, "saved", type, {w_gate ? 2 : 1, N, K});
  check(w_in, "w_in", type, {K, D});
  check(w_gate, "w_gate", type, {K, D});
  check(w_out, "w_out", type, {K, D});
  auto run = type == ScalarType::Double ? backward<double> : backward<float>;
  return run(grad_y, x, saved, w_in, w_gate, w_out, updated, activation_of(activation, "sub_ffn_train"), input_grad);
}

}  // namespace
}  // namespace fedpft

STABLE_TORCH_LIBRARY_IMPL(fedpft, CPU, m) {
  m.impl("sub_ffn_train", TORCH_BOX(&fedpft::sub_ffn_train_cpu));
  m.impl("sub_ffn_train_backward", TORCH_BOX(&fedpft::sub_ffn_train_backward_cpu));
}
