// Activations and their derivatives on the device, for every kernel that needs one. Real is float or double.
#pragma once

#include "../types.h"
#include "launch.h"

namespace fedpft::cuda {

template <class Real>
struct Activated {
  Real value, derivative;
};

namespace detail {

// float32 takes the hardware's exponential, within 2 + |z| units in the last place: far inside the tolerance of
// cases.py.
__device__ inline float exponential(float z) {
#ifdef __CUDA_ARCH__
  return __expf(z);
#else
  return exp(z);
#endif
}
__device__ inline double exponential(double z) { return exp(z); }

__device__ inline float reciprocal(float z) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, z);
#else
  return 1.0f / z;
#endif
}
__device__ inline double reciprocal(double z) { return 1.0 / z; }

template <class Real>
__device__ inline Real sigmoid(Real z) {
  return reciprocal(Real(1) + exponential(-z));
}

// 0.5 (1 + tanh(u)) = sigmoid(2u): the tail below zero loses no digits.
template <class Real>
__device__ inline Real twice_tanh_argument(Real z) {
  return Real(1.59576912160573071176) * (z + Real(0.044715) * z * z * z);
}

// Share of a standard normal variable below z.
template <class Real>
__device__ inline Real normal_below(Real z) {
  return Real(0.5) + Real(0.5) * erf(z * Real(0.70710678118654752440));
}

}  // namespace detail

template <Activation A, class Real>
__device__ inline Real value(Real z) {
  if constexpr (A == Activation::kRelu) return z < Real(0) ? Real(0) : z;  // keeps a value that is not a number
  if constexpr (A == Activation::kGelu) return z * detail::normal_below(z);
  if constexpr (A == Activation::kGeluTanh) return z * detail::sigmoid(detail::twice_tanh_argument(z));
  if constexpr (A == Activation::kSilu) return z * detail::sigmoid(z);
  if constexpr (A == Activation::kQuickGelu) return z * detail::sigmoid(Real(1.702) * z);
}

// Both at once, because they share the expensive term.
template <Activation A, class Real>
__device__ inline Activated<Real> activated(Real z) {
  if constexpr (A == Activation::kRelu) return {value<A>(z), z > Real(0) ? Real(1) : Real(0)};
  if constexpr (A == Activation::kGelu) {
    const Real below = detail::normal_below(z);
    return {z * below, below + z * Real(0.39894228040143267794) * detail::exponential(Real(-0.5) * z * z)};
  }
  if constexpr (A == Activation::kGeluTanh) {
    const Real s = detail::sigmoid(detail::twice_tanh_argument(z));
    const Real inner = Real(1.59576912160573071176) * (Real(1) + Real(3 * 0.044715) * z * z);
    return {z * s, s + z * s * (Real(1) - s) * inner};
  }
  if constexpr (A == Activation::kSilu) {
    const Real s = detail::sigmoid(z);
    return {z * s, s + z * s * (Real(1) - s)};
  }
  if constexpr (A == Activation::kQuickGelu) {
    const Real s = detail::sigmoid(Real(1.702) * z);
    return {z * s, s + Real(1.702) * z * s * (Real(1) - s)};
  }
}

// Calls f.template run<A>() with the activation as a compile-time constant: one branch for many values.
template <class F>
__device__ inline void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kRelu:
      return f.template run<Activation::kRelu>();
    case Activation::kGelu:
      return f.template run<Activation::kGelu>();
    case Activation::kGeluTanh:
      return f.template run<Activation::kGeluTanh>();
    case Activation::kSilu:
      return f.template run<Activation::kSilu>();
    case Activation::kQuickGelu:
      return f.template run<Activation::kQuickGelu>();
  }
}

}  // namespace fedpft::cuda
