// What the FFN operators share: the weights of a block of neurons, in the type that is computed in.
//
// Weights that are stored in that type are used where they lie. Others (bfloat16 and float16, or rows chosen from the
// full weights) are loaded one block of neurons at a time into scratch memory that the threads fill together, so no
// copy of the weights ever exists as a whole.
// N tokens, D hidden size, F FFN neurons of the full weights, K neurons that are used.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "capability.h"
#include "matrix.h"
#include "operands.h"
#include "tiles.h"

namespace fedpft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kNeuronsPerBlock = 384;  // with the tokens of a tile: hidden values that fit the second-level cache

// sub_ffn.cpp
std::tuple<Tensor, Tensor, Tensor> sub_ffn_cpu(
    Tensor x, Tensor w_in, Optional b_in, Optional w_gate, Optional b_gate, Tensor w_out, Optional b_out,
    Optional neurons, Optional mask, std::string activation, double eps, bool count, bool save, bool compact);

inline void check(const Optional& tensor, const char* name, ScalarType type, std::vector<int64_t> shape) {
  if (tensor) check(*tensor, name, type, shape);
}

template <class Real>
const RowKernels<Real>& row_kernels();
template <>
inline const RowKernels<float>& row_kernels() {
  return vector_kernels().float32;
}
template <>
inline const RowKernels<double>& row_kernels() {
  return vector_kernels().float64;
}

template <class Real>
constexpr Element kElement = sizeof(Real) == sizeof(double) ? Element::kFloat64 : Element::kFloat32;
template <class Real>
constexpr ScalarType kScalarType = sizeof(Real) == sizeof(double) ? ScalarType::Double : ScalarType::Float;

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* data(const Optional& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <class Real>
Tensor scratch(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, kScalarType<Real>);
}

// Rows of a weight as they are stored, all or chosen ones, that become matrices of Real.
template <class Real>
class NeuronRows {
 public:
  NeuronRows() = default;
  NeuronRows(const Tensor& weight, const int64_t* chosen)
      : data_(static_cast<char*>(weight.mutable_data_ptr())),
        element_(element_of(weight, "a weight")),
        bytes_(static_cast<int64_t>(weight.element_size())),
        columns_(weight.size(1)),
        row_stride_(weight.stride(0)),
        column_stride_(weight.stride(1)),
        chosen_(chosen) {}

  bool is_wide() const { return element_ == kElement<Real>; }
  bool in_place() const { return is_wide() && chosen_ == nullptr; }
  int64_t columns() const { return columns_; }

  // The rows where they lie, or as load() leaves them in `scratch`.
  Matrix<Real> matrix(int64_t first, int64_t count, Real* scratch) const {
    if (in_place()) {
      Real* const row = reinterpret_cast<Real*>(data_) + first * row_stride_;
      return {row, count, columns_, row_stride_, column_stride_};
    }
    if (transposed()) return {scratch, count, columns_, 1, count};
    return {scratch, count, columns_, columns_, 1};
  }

  // Fills one of `shares` equal parts of `scratch`, in the order in which the weight lies in memory.
  void load(int64_t first, int64_t count, Real* scratch, int64_t share, int64_t shares) const {
    if (in_place()) return;
    const RowKernels<Real>& kernels = row_kernels<Real>();
    const int64_t lines = transposed() ? columns_ : count;
    for (int64_t line = lines * share / shares; line < lines * (share + 1) / shares; ++line) {
      if (transposed()) {
        const char* column = data_ + (line * column_stride_ + (chosen_ ? 0 : first * row_stride_)) * bytes_;
        kernels.load(element_, column, chosen_ ? chosen_ + first : nullptr, row_stride_, scratch + line * count, count);
      } else {
        const char* row = stored_row(first + line);
        kernels.load(element_, row, nullptr, 1, scratch + line * columns_, columns_);
      }
    }
  }

 private:
  bool transposed() const { return column_stride_ != 1; }
  const char* stored_row(int64_t i) const { return data_ + (chosen_ ? chosen_[i] : i) * row_stride_ * bytes_; }

  char* data_ = nullptr;
  Element element_ = kElement<Real>;
  int64_t bytes_ = 0, columns_ = 0, row_stride_ = 0, column_stride_ = 1;
  const int64_t* chosen_ = nullptr;
};

// A vector, or the chosen values of it.
template <class Real>
Optional widened(const Optional& vector, const Optional& chosen) {
  if (!vector) return std::nullopt;
  const int64_t count = chosen ? chosen->size(0) : vector->size(0);
  const Tensor values = scratch<Real>(*vector, {count});
  row_kernels<Real>().load(
      element_of(*vector, "a bias"), vector->const_data_ptr(), data<int64_t>(chosen), vector->stride(0),
      data<Real>(values), count);
  return values;
}

template <class Real>
struct NeuronBlock {
  int64_t first, count;
  bool is_first, is_last;
  Matrix<Real> in, gate, out;  // (count, D)
};

// The weights of the neurons that are used, block by block.
template <class Real>
class NeuronBlocks {
 public:
  // Neurons from `end` on are left out, and no block holds neurons from both sides of `split`.
  NeuronBlocks(
      const Tensor& w_in, const Optional& w_gate, const Tensor& w_out, const Optional& chosen, int64_t end,
      int64_t split = 0)
      : in_(w_in, data<int64_t>(chosen)), out_(w_out, data<int64_t>(chosen)) {
    if (w_gate) gate_ = NeuronRows<Real>(*w_gate, data<int64_t>(chosen));
    add_blocks(0, split);
    add_blocks(split, end);
    if (starts_.empty()) starts_.push_back(0);  // a block of no neurons still writes the outputs
    starts_.push_back(end);
    for (size_t i = 1; i < starts_.size(); ++i) widest_ = std::max(widest_, starts_[i] - starts_[i - 1]);
    const bool in_place = in_.in_place() && out_.in_place() && gate_.in_place();
    if (!in_place) scratch_ = scratch<Real>(w_in, {w_gate ? 3 : 2, widest_, w_in.size(1)});
  }

  int64_t widest() const { return widest_; }

  // body(wave, tile, block) for every tile of a wave at once, block after block; then body_of_wave(wave, block).
  template <class Body, class WaveBody>
  void for_each(const Tiles& tiles, const Body& body, const WaveBody& body_of_wave) const {
    const auto visit = [&](const Wave& wave, const NeuronBlock<Real>& block) {
      tiles.for_each(wave, [&](const Tile& tile) { body(wave, tile, block); });
      body_of_wave(wave, block);
    };
    const size_t blocks = starts_.size() - 1;
    if (scratch_ && in_.is_wide()) {  // chosen rows: gathered once a call, since x and y have no scratch of their own
      for (size_t i = 0; i < blocks; ++i) {
        const NeuronBlock<Real> block = load(i);
        for (const Wave& wave : tiles.waves()) visit(wave, block);
      }
      return;
    }
    for (const Wave& wave : tiles.waves()) {
      for (size_t i = 0; i < blocks; ++i) visit(wave, load(i));
    }
  }
  template <class Body>
  void for_each(const Tiles& tiles, const Body& body) const {
    for_each(tiles, body, [](const Wave&, const NeuronBlock<Real>&) {});
  }

 private:
  void add_blocks(int64_t first, int64_t last) {
    if (first == last) return;
    const int64_t blocks = (last - first + kNeuronsPerBlock - 1) / kNeuronsPerBlock;
    for (int64_t i = 0; i < blocks; ++i) starts_.push_back(first + (last - first) * i / blocks / 16 * 16);
  }

  NeuronBlock<Real> load(size_t i) const {
    const int64_t first = starts_[i], count = starts_[i + 1] - first, part = widest_ * in_.columns();
    Real *in = data<Real>(scratch_), *out = in + part, *gate = out + part;
    if (scratch_) {
      const int64_t shares = torch::stable::get_num_threads();
      torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
        for (int64_t share = begin; share < end; ++share) {
          in_.load(first, count, in, share, shares);
          out_.load(first, count, out, share, shares);
          gate_.load(first, count, gate, share, shares);
        }
      });
    }
    return {
        first,
        count,
        i == 0,
        i + 2 == starts_.size(),
        in_.matrix(first, count, in),
        gate_.matrix(first, count, gate),
        out_.matrix(first, count, out)};
  }

  NeuronRows<Real> in_, gate_, out_;
  std::vector<int64_t> starts_;
  int64_t widest_ = 0;
  Optional scratch_;
};

// grad_x of a tile: what this block of neurons adds to it. `second` is empty in a plain FFN.
template <class Real>
void add_input_gradient(
    const Matrix<Real>& grad_x, const Matrix<Real>& first, const Matrix<Real>& second, const NeuronBlock<Real>& block) {
  const Matrix<Real>& weight = second.data ? block.gate : block.in;
  block.is_first ? multiply(grad_x, first, weight) : multiply_add(grad_x, grad_x, first, weight);
  if (second.data) multiply_add(grad_x, grad_x, second, block.in);
}

// A tensor of N rows, tile by tile: where it lies, or widened in scratch memory that is as long as a wave.
template <class Real>
class TokenRows {
 public:
  TokenRows(const Tensor& tensor, const Tiles& tiles)
      : tensor_(tensor), tiles_(tiles), element_(element_of(tensor, "x")) {
    if (element_ != kElement<Real>) scratch_ = scratch<Real>(tensor, {tiles.wave_tokens(), tensor.size(1)});
  }

  Matrix<Real> tile(const Tile& tile) const { return rows(tile.start, tile.tokens, tile.slot * tiles_.tokens()); }
  Matrix<Real> wave(const Wave& wave) const { return rows(wave.start, wave.tokens, 0); }

  void load(const Tile& tile) const {
    if (!scratch_) return;
    const Matrix<Real> to = this->tile(tile);
    tiles_.for_each_row(tile, [&](int64_t, int64_t t) {
      row_kernels<Real>().load(element_, stored(tile.start + t), nullptr, tensor_.stride(1), to.row(t), to.columns);
    });
  }

  void store(const Tile& tile) const {  // to contiguous rows only
    if (!scratch_) return;
    const Matrix<Real> from = this->tile(tile);
    tiles_.for_each_row(tile, [&](int64_t, int64_t t) {
      row_kernels<Real>().store(element_, from.row(t), stored(tile.start + t), from.columns);
    });
  }

 private:
  char* stored(int64_t row) const {
    return data<char>(tensor_) + row * tensor_.stride(0) * static_cast<int64_t>(tensor_.element_size());
  }

  Matrix<Real> rows(int64_t start, int64_t tokens, int64_t position) const {
    if (!scratch_) return Matrix<Real>(tensor_).slice(start, tokens);
    const int64_t columns = tensor_.size(1);
    return {data<Real>(scratch_) + position * columns, tokens, columns, columns};
  }

  const Tensor tensor_;
  const Tiles& tiles_;
  const Element element_;
  Optional scratch_;
};

// The pre-activations, (P, N, K), contiguous.
template <class Real>
class SavedRows {
 public:
  explicit SavedRows(const Tensor& saved)
      : data_(data<char>(saved)),
        element_(element_of(saved, "saved")),
        bytes_(saved.element_size()),
        tokens_(saved.size(1)),
        neurons_(saved.size(2)) {}

  bool in_place() const { return element_ == kElement<Real>; }
  void* at(int64_t p, int64_t token, int64_t neuron) const {
    return data_ + ((p * tokens_ + token) * neurons_ + neuron) * bytes_;
  }
  Matrix<Real> tile(int64_t p, const Tile& tile, int64_t neuron, int64_t count) const {
    return {static_cast<Real*>(at(p, tile.start, neuron)), tile.tokens, count, neurons_};
  }
  void store(const Real* values, int64_t p, int64_t token, int64_t neuron, int64_t count) const {
    row_kernels<Real>().store(element_, values, at(p, token, neuron), count);
  }
  // Where the values lie, or widened in `buffer`.
  const Real* load(int64_t p, int64_t token, int64_t neuron, int64_t count, Real* buffer) const {
    if (in_place()) return static_cast<const Real*>(at(p, token, neuron));
    row_kernels<Real>().load(element_, at(p, token, neuron), nullptr, 1, buffer, count);
    return buffer;
  }

 private:
  char* data_;
  Element element_;
  int64_t bytes_, tokens_, neurons_;
};

// One token, n neurons: `first` becomes the gradient of the first pre-activation z, `second` that of `up`, which a
// plain FFN does not have, and `hidden` the hidden value of the first `updated` neurons.
template <class Real>
void differentiate_row(
    Activation act, const Real* z, const Real* up, Real* first, Real* second, Real* hidden, int64_t n,
    int64_t updated) {
  const RowKernels<Real>& kernels = row_kernels<Real>();
  if (!up) {
    if (updated > 0) kernels.activate(act, z, hidden, updated);
    return kernels.multiply_derivative(act, z, first, n);
  }
  kernels.activate(act, z, second, n);
  std::copy(second, second + updated, hidden);
  kernels.multiply(hidden, up, updated);
  kernels.multiply(second, first, n);
  kernels.multiply_derivative(act, z, first, n);
  kernels.multiply(first, up, n);
}

}  // namespace fedpft
