// Element types on the device: conversions to and from the type of accumulation, and loads of several at once.
#pragma once

#include "../types.h"
#include "launch.h"

namespace fedpft::cuda {

// The type that values are computed in: float32, or float64 for float64.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T>
__device__ inline T narrow(Wide<T> x) {
  return x;
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// V elements that lie side by side and are read or written at once; their address must be a multiple of the size.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T values[V];
};

constexpr int kVectorBytes = 16;  // the widest access of one thread
template <class T>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(T));

template <int V, class T>
__device__ inline Vector<T, V> load(const T* address) {
  return *reinterpret_cast<const Vector<T, V>*>(address);
}

template <int V, class T>
__device__ inline void store(T* address, const Vector<T, V>& vector) {
  *reinterpret_cast<Vector<T, V>*>(address) = vector;
}

inline bool is_aligned(const void* address, int64_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

template <class T>
struct Type {
  using type = T;
};

// body(Type<T>{}) for the T that `element` names.
template <class Body>
cudaError_t with_type(Element element, const Body& body) {
  switch (element) {
    case Element::kFloat32:
      return body(Type<float>{});
    case Element::kFloat64:
      return body(Type<double>{});
    case Element::kFloat16:
      return body(Type<__half>{});
    case Element::kBFloat16:
      return body(Type<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace fedpft::cuda
