// Element types and activations as the kernels name them. `what` is an operator or an argument, for the error's text.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <string_view>

#include "types.h"

namespace fedpft {

// Raises a Python error. Not by torch's own macro, which writes the text to a stream: a compiler that links libstdc++
// into the library brings a second set of locale facets, and a stream then crashes on those of the other set.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string text;
  (text.append(std::string_view(parts)), ...);
  throw std::runtime_error(text);
}

inline Element element_of(const torch::stable::Tensor& tensor, const char* what) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::Double:
      return Element::kFloat64;
    case ScalarType::Half:
      return Element::kFloat16;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      fail(what, ": unsupported dtype");
  }
}

inline Activation activation_of(const std::string& activation, const char* what) {
  if (activation == "relu") return Activation::kRelu;
  if (activation == "gelu") return Activation::kGelu;
  if (activation == "gelu_tanh") return Activation::kGeluTanh;
  if (activation == "silu") return Activation::kSilu;
  if (activation == "quick_gelu") return Activation::kQuickGelu;
  fail(what, ": unknown activation ", activation);
}

}  // namespace fedpft
