// Element types and activations as the kernels name them. `what` is an operator or an argument, for the error's text.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

#include "types.h"

namespace fedpft {

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
      STD_TORCH_CHECK(false, what, ": unsupported dtype");
  }
}

inline Activation activation_of(const std::string& activation, const char* what) {
  if (activation == "relu") return Activation::kRelu;
  if (activation == "gelu") return Activation::kGelu;
  if (activation == "gelu_tanh") return Activation::kGeluTanh;
  if (activation == "silu") return Activation::kSilu;
  if (activation == "quick_gelu") return Activation::kQuickGelu;
  STD_TORCH_CHECK(false, what, ": unknown activation ", activation);
}

}  // namespace fedpft
