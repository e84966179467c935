// Takes the place of csrc/cuda/ffn_gemm.cpp and the CUTLASS files behind it: what ffn_gemm.h promises, by plain loops.
// It shows that the host code asks for the right thing; whether CUTLASS delivers it only a GPU can show.
#include <cmath>
#include <vector>

#include "../../csrc/cuda/activation.cuh"
#include "../../csrc/cuda/element.h"
#include "../../csrc/cuda/ffn_gemm.h"

namespace fedpft::cuda {
namespace {

struct Evaluate {
  float z;
  Activated<float>& result;
  template <Activation A>
  void run() const {
    result = activated<A>(z);
  }
};

Activated<float> evaluate(Activation activation, float z) {
  Activated<float> result;
  with_activation(activation, Evaluate{z, result});
  return result;
}

template <class T>
float get(const void* base, int64_t at) {
  return widen(static_cast<const T*>(base)[at]);
}

template <class T>
void put(void* base, int64_t at, float value) {
  if (base != nullptr) static_cast<T*>(base)[at] = narrow<T>(value);
}

// Keeps the promise that ffn_gemm.h asks for: alignment to 16 bytes and multiples of 8.
const char* check(std::initializer_list<const void*> matrices, std::initializer_list<int64_t> dimensions) {
  for (const void* matrix : matrices) {
    if (!is_aligned(matrix, 16)) return "a matrix is not aligned";
  }
  for (const int64_t dimension : dimensions) {
    if (dimension % 8 != 0) return "a dimension is no multiple of 8";
  }
  return nullptr;
}

template <class T>
float dot(const void* a, int64_t at_a, const void* b, int64_t at_b, int D) {
  float sum = 0.0f;
  for (int d = 0; d < D; ++d) sum += get<T>(a, at_a + d) * get<T>(b, at_b + d);
  return sum;
}

template <class T>
const char* forward(const ForwardGemm& g, cudaStream_t) {
  if (const char* error = check(
          {g.x, g.w, g.gate, g.hidden, g.saved_first, g.saved_second},
          {g.K, g.D, g.ld_x, g.ld_w, g.ld_gate, g.ld_hidden, g.ld_saved})) {
    return error;
  }
  for (int64_t t = 0; t < g.N; ++t) {
    for (int64_t k = 0; k < g.K; ++k) {
      const float z = dot<T>(g.x, t * g.ld_x, g.w, k * g.ld_w, g.D) + (g.bias ? get<T>(g.bias, k) : 0.0f);
      const Activated<float> act = evaluate(g.activation, g.gate ? get<T>(g.gate, t * g.ld_gate + k) : z);
      const float factor = g.gate ? z : 1.0f;
      const int64_t at_saved = t * g.ld_saved + k;
      put<T>(g.hidden, t * g.ld_hidden + k, g.linear ? z : act.value * factor);
      if (g.compact) {
        put<__nv_bfloat16>(g.saved_first, at_saved, act.derivative * factor);
        put<__nv_bfloat16>(g.saved_second, at_saved, act.value);
      } else {
        put<T>(g.saved_first, at_saved, z);
      }
      if (g.counts && (!g.mask || g.mask[t])) g.counts[k] += std::fabs(act.value) <= g.eps;
    }
  }
  return nullptr;
}

template <class T>
const char* backward(const BackwardGemm& g, cudaStream_t) {
  if (const char* error = check(
          {g.grad_y, g.w_out, g.saved_first, g.saved_second, g.grad_first, g.grad_second},
          {g.K, g.D, g.ld_grad_y, g.ld_w_out, g.ld_saved})) {
    return error;
  }
  for (int64_t t = 0; t < g.N; ++t) {
    for (int64_t k = 0; k < g.K; ++k) {
      const float grad = dot<T>(g.grad_y, t * g.ld_grad_y, g.w_out, k * g.ld_w_out, g.D);
      const int64_t at = t * g.K + k, at_saved = t * g.ld_saved + k;
      if (g.compact) {
        put<T>(g.grad_first, at, grad * get<__nv_bfloat16>(g.saved_first, at_saved));
        if (g.grad_second) put<T>(g.grad_second, at, grad * get<__nv_bfloat16>(g.saved_second, at_saved));
        continue;
      }
      const Activated<float> act = evaluate(g.activation, get<T>(g.saved_first, at_saved));
      put<T>(g.grad_first, at, grad * act.derivative * (g.saved_second ? get<T>(g.saved_second, at_saved) : 1.0f));
      put<T>(g.grad_second, at, grad * act.value);
    }
  }
  return nullptr;
}

}  // namespace

const FfnGemms* ffn_gemms(Element element) {
  static const FfnGemms bfloat16 = {forward<__nv_bfloat16>, backward<__nv_bfloat16>};
  static const FfnGemms float16 = {forward<__half>, backward<__half>};
  return element == Element::kBFloat16 ? &bfloat16 : element == Element::kFloat16 ? &float16 : nullptr;
}

}  // namespace fedpft::cuda
