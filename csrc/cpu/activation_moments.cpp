// activation_moments: first and second moments of what an FFN's neurons pass on, added to sums over many calls.
//
//   h = s act(x W_in^T + b_in), gated: h = s act(x W_gate^T + b_gate) * (x W_in^T + b_in)
//   total_j += sum of h_j;  second_j += sum of h_j^2, or second_ij += sum of h_i h_j for i <= j;  over tokens under the
//   mask
//
// Shapes: x (N, D); W_in, W_gate (F, D); biases (F,); s (N,); total (F,), second (F,) or (F, F), float64, contiguous.
// Accumulation: h in float32 (float64 for float64); the products of kTokensPerProduct tokens likewise, all else in
//   float64. So a sum of products is as exact for a corpus as it is for so many tokens.
// Determinism: the same bits on every run with the same threads and instruction set.
// Bytes moved: h exists for kTokensHeld tokens at a time, which pass once over each tile of `second`; the float32
//   products of a tile stay in the second-level cache. Tokens outside the mask are not loaded.
// Parallel over blocks of neurons, then over tiles of the triangle. Scratch: x and h of the tokens held, and a tile, in
// a
//   gated FFN also a block of h, a thread.
#include <torch/csrc/stable/library.h>

#include <memory>

#include "ffn.h"

namespace fedpft {
namespace {

constexpr int64_t kTokensPerProduct = 256;
constexpr int64_t kTokensHeld = 512;
constexpr int64_t kTokensPerTask = 32;
constexpr int64_t kNeuronsPerTask = 192;
constexpr int64_t kTileRows = 128, kTileColumns = 512;

template <class Real>
std::unique_ptr<Real[]> buffer(int64_t size) {
  return std::unique_ptr<Real[]>(new Real[std::max<int64_t>(size, 1)]);
}

// body(first, count) for every block of `total`, in parallel.
template <class Body>
void for_each_block(int64_t total, int64_t size, const Body& body) {
  torch::stable::parallel_for(0, (total + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i * size, std::min(size, total - i * size));
  });
}

template <class Real>
struct Ffn {
  NeuronRows<Real> in;
  std::optional<NeuronRows<Real>> gate;
  Optional b_in, b_gate;  // of Real
  Activation activation;
};

// h of the tokens of x for the neurons from `first` on that `values` has columns for. shares: one a token, or null.
template <class Real>
void activations(
    const Ffn<Real>& ffn, const Matrix<Real>& x, const Real* shares, int64_t first, const Matrix<Real>& values) {
  const RowKernels<Real>& kernels = row_kernels<Real>();
  const int64_t count = values.columns;
  const auto project = [&](const NeuronRows<Real>& rows, const Matrix<Real>& out) {
    const auto widened = buffer<Real>(rows.in_place() ? 0 : count * rows.columns());
    rows.load(first, count, widened.get(), 0, 1);
    multiply(out, x, rows.matrix(first, count, widened.get()).transposed());
  };
  const auto scratch = buffer<Real>(ffn.gate ? x.rows * count : 0);
  const Matrix<Real> up(scratch.get(), x.rows, count, count);
  project(ffn.gate ? *ffn.gate : ffn.in, values);
  if (ffn.gate) project(ffn.in, up);
  const Real *bias_up = data<Real>(ffn.b_in), *bias = ffn.gate ? data<Real>(ffn.b_gate) : bias_up;
  for (int64_t t = 0; t < x.rows; ++t) {
    Real* h = values.row(t);
    if (bias) kernels.add(h, bias + first, count);
    kernels.activate(ffn.activation, h, h, count);
    if (ffn.gate) {
      if (bias_up) kernels.add(up.row(t), bias_up + first, count);
      kernels.multiply(h, up.row(t), count);
    }
    if (shares) kernels.scale(h, shares[t], count);
  }
}

// Some of the products. Of the tiles of some rows the first begins at the diagonal, and is at least as wide as high:
// what is computed below the diagonal is little, and each row has something above it.
struct ProductTile {
  int64_t row, column, rows, columns;
};

std::vector<ProductTile> triangle(int64_t F) {
  std::vector<ProductTile> tiles;
  for (int64_t row = 0; row < F; row += kTileRows) {
    const int64_t count = (F - row + kTileColumns - 1) / kTileColumns;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = row + (F - row) * i / count, end = row + (F - row) * (i + 1) / count;
      tiles.push_back({row, begin, std::min(kTileRows, F - row), end - begin});
    }
  }
  return tiles;
}

// second_ij += the products of a tile.
template <class Real>
void add_tile(const Matrix<Real>& hidden, const ProductTile& tile, Real* scratch, double* second) {
  const RowKernels<Real>& kernels = row_kernels<Real>();
  const auto [i, j, rows, columns] = tile;
  const int64_t F = hidden.columns;
  for (int64_t start = 0; start < hidden.rows; start += kTokensPerProduct) {
    const int64_t tokens = std::min(kTokensPerProduct, hidden.rows - start);
    const Matrix<Real> left(hidden.row(start) + i, tokens, rows, F), right(hidden.row(start) + j, tokens, columns, F);
    const Matrix<Real> products(scratch, rows, columns, columns);
    multiply(products, left.transposed(), right);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t skipped = std::max<int64_t>(0, i + row - j);  // below the diagonal
      kernels.add_wide(second + (i + row) * F + j + skipped, products.row(row) + skipped, columns - skipped);
    }
  }
}

template <class Real>
void add_moments(
    const Tensor& total, const Tensor& second, const Tensor& x, const Ffn<Real>& ffn, const Optional& shares,
    const std::vector<int64_t>& tokens) {
  const RowKernels<Real>& kernels = row_kernels<Real>();
  const int64_t N = static_cast<int64_t>(tokens.size()), D = x.size(1), F = total.size(0);
  const bool products = second.dim() == 2;
  double *sums = data<double>(total), *second_sums = data<double>(second);
  const int64_t held = std::min(N, kTokensHeld), row_bytes = x.stride(0) * static_cast<int64_t>(x.element_size());
  const Tensor all_given = scratch<Real>(x, {held, D}), all_hidden = scratch<Real>(x, {held, F});
  std::vector<Real> given_shares(shares ? held : 0);
  const std::vector<ProductTile> tiles = products ? triangle(F) : std::vector<ProductTile>();
  for (int64_t start = 0; start < N; start += held) {
    const int64_t count = std::min(held, N - start);
    const Matrix<Real> given = Matrix<Real>(all_given).slice(0, count);
    const Matrix<Real> hidden = Matrix<Real>(all_hidden).slice(0, count);
    for_each_block(count, kTokensPerTask, [&](int64_t first, int64_t rows) {
      for (int64_t t = first; t < first + rows; ++t) {
        const int64_t token = tokens[start + t];
        kernels.load(element_of(x, "x"), data<char>(x) + token * row_bytes, nullptr, x.stride(1), given.row(t), D);
        if (shares) given_shares[t] = data<Real>(*shares)[token * shares->stride(0)];
      }
    });
    for_each_block(F, kNeuronsPerTask, [&](int64_t first, int64_t neurons) {
      const Matrix<Real> values(hidden.data + first, count, neurons, F);
      activations(ffn, given, shares ? given_shares.data() : nullptr, first, values);
      for (int64_t t = 0; t < count; ++t) {
        kernels.add_wide(sums + first, values.row(t), neurons);
        if (!products) kernels.add_squares(second_sums + first, values.row(t), neurons);
      }
    });
    torch::stable::parallel_for(0, static_cast<int64_t>(tiles.size()), 1, [&](int64_t begin, int64_t end) {
      const auto scratch = buffer<Real>(kTileRows * kTileColumns);
      for (int64_t n = begin; n < end; ++n) add_tile(hidden, tiles[n], scratch.get(), second_sums);
    });
  }
}

template <class Real>
void run(
    const Tensor& total, const Tensor& second, const Tensor& x, const Tensor& w_in, const Optional& b_in,
    const Optional& w_gate, const Optional& b_gate, const Optional& shares, const Optional& mask, Activation act) {
  const Mask counted(mask, x.size(0));
  std::vector<int64_t> tokens;
  for (int64_t n = 0; n < x.size(0); ++n) {
    if (counted[n]) tokens.push_back(n);
  }
  Ffn<Real> ffn{NeuronRows<Real>(w_in, nullptr), {}, widened<Real>(b_in, {}), widened<Real>(b_gate, {}), act};
  if (w_gate) ffn.gate.emplace(*w_gate, nullptr);
  add_moments(total, second, x, ffn, shares, tokens);
}

void activation_moments_cpu(
    Tensor total, Tensor second, Tensor x, Tensor w_in, Optional b_in, Optional w_gate, Optional b_gate,
    Optional shares, Optional mask, std::string activation) {
  const ScalarType type = x.scalar_type();
  if (x.dim() != 2 || w_in.dim() != 2) fail("activation_moments: x and w_in must have two dimensions");
  const int64_t N = x.size(0), D = x.size(1), F = w_in.size(0);
  check(total, "total", ScalarType::Double, {F});
  check(second, "second", ScalarType::Double, second.dim() == 1 ? std::vector<int64_t>{F} : std::vector<int64_t>{F, F});
  if (!total.is_contiguous() || !second.is_contiguous()) {
    fail("activation_moments: total and second must be contiguous");
  }
  check(w_in, "w_in", type, {F, D});
  check(b_in, "b_in", type, {F});
  check(w_gate, "w_gate", type, {F, D});
  check(b_gate, "b_gate", type, {F});
  check(shares, "shares", type == ScalarType::Double ? type : ScalarType::Float, {N});
  auto add = type == ScalarType::Double ? run<double> : run<float>;
  add(total, second, x, w_in, b_in, w_gate, b_gate, shares, mask, activation_of(activation, "activation_moments"));
}

}  // namespace
}  // namespace fedpft

STABLE_TORCH_LIBRARY_IMPL(fedpft, CPU, m) { m.impl("activation_moments", TORCH_BOX(&fedpft::activation_moments_cpu)); }
