// What the operators ask of the tensors they are given. The wrappers check with better words; the checks here keep a
// direct call from reading past a tensor's end.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "../tensors.h"

namespace fedpft {

inline void check(
    const torch::stable::Tensor& tensor, const char* name, torch::headeronly::ScalarType type,
    std::vector<int64_t> shape) {
  bool fits = tensor.scalar_type() == type && tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = tensor.size(d) == shape[d];
  if (!fits) fail(name, " has a wrong shape or dtype");
}

// The tensor itself where its values are contiguous, else a copy.
inline torch::stable::Tensor packed(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The same, for a matrix of which only each row must be contiguous.
inline torch::stable::Tensor packed_rows(const torch::stable::Tensor& matrix) {
  return matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
}

// (N,) bool, or nothing: then every token counts.
class Mask {
 public:
  Mask(const std::optional<torch::stable::Tensor>& mask, int64_t tokens) {
    if (!mask) return;
    check(*mask, "mask", torch::headeronly::ScalarType::Bool, {tokens});
    values_ = packed(*mask);
    counted_ = static_cast<const bool*>(values_->const_data_ptr());
  }
  bool operator[](int64_t token) const { return counted_ == nullptr || counted_[token]; }

 private:
  std::optional<torch::stable::Tensor> values_;
  const bool* counted_ = nullptr;
};

}  // namespace fedpft
