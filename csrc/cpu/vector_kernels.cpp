// Row loops, compiled once per instruction set (CMakeLists.txt): FEDPFT_KERNELS is the name of this copy's table.
//
// Formulas, with exp the float32 polynomial below (relative error 3e-9 before rounding), libm's in float64:
//   gelu       z Phi(z),  Phi(-x) = exp(-x^2 / 2) t P(t),  t = 1 / (1 + 0.35 x),  x >= 0; P is a degree 6 fit of the
//              normal tail, whose error times max(x, 1/2) is below 6e-9: what is left is float32 rounding
//   gelu_tanh  z sigmoid(2 u),  u = sqrt(2 / pi) (z + 0.044715 z^3)
//   silu       z sigmoid(z)
//   quick_gelu z sigmoid(1.702 z)
// Measured against float64 on [-10, 10], |error| / max(1, |value|): 1.5e-7 for all four; derivatives 2e-7, 2e-6, 8e-7,
// 1e-6, because 1 - sigmoid cancels in the last three.
// Determinism: no sum crosses elements.
#include "vector_kernels.h"

#include "elements.h"

namespace fedpft {
namespace {

inline double exponential(double x) { return __builtin_exp(x); }

// 2^k e^r with k = round(x / ln 2); adding and taking off 1.5 * 2^23 rounds, and leaves k in the low bits.
// Below -87.7 the result is 0 and above 88.7 infinite; NaN passes through.
inline float exponential(float x) {
  x = x < -88.0f ? -88.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float k = shifted - 12582912.0f;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  const float p =
      (((1.381446627e-3f * r + 8.368780475e-3f) * r + 4.166839423e-2f) * r + 1.666652011e-1f) * r + 4.999999341e-1f;
  const float scale = bits<float>((bits<int>(shifted) - 0x4B400000 + 127) << 23);
  return ((p * r) * r + r + 1.0f) * scale;
}

template <class Real>
inline Real sigmoid(Real x) {
  return Real(1) / (Real(1) + exponential(-x));
}

// The standard normal distribution: its function, and its density from the same exponential.
template <class Real>
struct Normal {
  Real below;
  Real density;
};

inline Normal<double> normal(double z) {
  return {0.5 * __builtin_erfc(-z * 0.70710678118654752440), 0.39894228040143267794 * exponential(-0.5 * z * z)};
}

inline Normal<float> normal(float z) {
  const float x = magnitude(z);
  const float t = 1.0f / (1.0f + 0.35f * x);
  const float e = exponential(-0.5f * x * x);
  float p = 3.557020610e-2f;
  p = p * t - 1.425810648e-1f;
  p = p * t + 1.313377707e-1f;
  p = p * t + 8.896135030e-2f;
  p = p * t + 9.858749106e-2f;
  p = p * t + 1.499116786e-1f;
  p = p * t + 1.382125797e-1f;
  const float tail = e * t * p;
  return {z >= 0.0f ? 1.0f - tail : tail, 0.398942280f * e};
}

template <class Real>
inline Real twice_tanh_argument(Real z) {
  return Real(1.59576912160573071176) * (z + Real(0.044715) * z * z * z);
}

template <Activation A, class Real>
inline Real value(Real z) {
  if constexpr (A == Activation::kRelu) return z < Real(0) ? Real(0) : z;
  if constexpr (A == Activation::kGelu) return z * normal(z).below;
  if constexpr (A == Activation::kGeluTanh) return z * sigmoid(twice_tanh_argument(z));
  if constexpr (A == Activation::kSilu) return z * sigmoid(z);
  if constexpr (A == Activation::kQuickGelu) return z * sigmoid(Real(1.702) * z);
}

template <Activation A, class Real>
inline Real derivative(Real z) {
  if constexpr (A == Activation::kRelu) return z > Real(0) ? Real(1) : Real(0);
  if constexpr (A == Activation::kGelu) {
    const Normal<Real> phi = normal(z);
    return phi.below + z * phi.density;
  }
  if constexpr (A == Activation::kGeluTanh) {
    const Real s = sigmoid(twice_tanh_argument(z));
    return s + z * s * (Real(1) - s) * Real(1.59576912160573071176) * (Real(1) + Real(3 * 0.044715) * z * z);
  }
  if constexpr (A == Activation::kSilu) {
    const Real s = sigmoid(z);
    return s + z * s * (Real(1) - s);
  }
  if constexpr (A == Activation::kQuickGelu) {
    const Real s = sigmoid(Real(1.702) * z);
    return s + Real(1.702) * z * s * (Real(1) - s);
  }
}

// Calls f with the activation as a compile-time constant, so that a row's loop has no branch.
template <class F>
inline void with_activation(Activation activation, F f) {
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

template <class Real>
struct Activate {
  const Real* z;
  Real* out;
  long n;
  template <Activation A>
  void run() const {
#pragma omp simd
    for (long j = 0; j < n; ++j) out[j] = value<A>(z[j]);
  }
};

template <class Real>
struct Differentiate {
  const Real* z;
  Real* out;
  long n;
  template <Activation A>
  void run() const {
#pragma omp simd
    for (long j = 0; j < n; ++j) out[j] = derivative<A>(z[j]);
  }
};

template <class Real>
struct MultiplyDerivative {
  const Real* z;
  Real* out;
  long n;
  template <Activation A>
  void run() const {
#pragma omp simd
    for (long j = 0; j < n; ++j) out[j] *= derivative<A>(z[j]);
  }
};

template <class Real>
void activate(Activation activation, const Real* z, Real* out, long n) {
  with_activation(activation, Activate<Real>{z, out, n});
}

template <class Real>
void differentiate(Activation activation, const Real* z, Real* out, long n) {
  with_activation(activation, Differentiate<Real>{z, out, n});
}

template <class Real>
void multiply_derivative(Activation activation, const Real* z, Real* out, long n) {
  with_activation(activation, MultiplyDerivative<Real>{z, out, n});
}

template <class Real>
void add(Real* out, const Real* a, long n) {
#pragma omp simd
  for (long j = 0; j < n; ++j) out[j] += a[j];
}

template <class Real>
void multiply(Real* out, const Real* a, long n) {
#pragma omp simd
  for (long j = 0; j < n; ++j) out[j] *= a[j];
}

template <class Real>
void count_inactive(const Real* active, Real eps, int* counts, long n) {
#pragma omp simd
  for (long j = 0; j < n; ++j) counts[j] += magnitude(active[j]) <= eps ? 1 : 0;
}

template <class Real, class E>
void load_as(const void* values, const long* index, long stride, Real* out, long n) {
  const auto* a = static_cast<const typename E::Stored*>(values);
  if (index) {
    for (long j = 0; j < n; ++j) out[j] = static_cast<Real>(E::load(a[index[j] * stride]));
  } else if (stride != 1) {
    for (long j = 0; j < n; ++j) out[j] = static_cast<Real>(E::load(a[j * stride]));
  } else {
#pragma omp simd
    for (long j = 0; j < n; ++j) out[j] = static_cast<Real>(E::load(a[j]));
  }
}

template <class Real>
void load(Element element, const void* a, const long* index, long stride, Real* out, long n) {
  switch (element) {
    case Element::kFloat32:
      return load_as<Real, Float32>(a, index, stride, out, n);
    case Element::kFloat64:
      return load_as<Real, Float64>(a, index, stride, out, n);
    case Element::kFloat16:
      return load_as<Real, Float16>(a, index, stride, out, n);
    case Element::kBFloat16:
      return load_as<Real, BFloat16>(a, index, stride, out, n);
  }
}

template <class Real, class E>
void store_as(const Real* a, void* values, long n) {
  auto* out = static_cast<typename E::Stored*>(values);
#pragma omp simd
  for (long j = 0; j < n; ++j) out[j] = E::store(static_cast<typename E::Wide>(a[j]));
}

template <class Real>
void store(Element element, const Real* a, void* out, long n) {
  switch (element) {
    case Element::kFloat32:
      return store_as<Real, Float32>(a, out, n);
    case Element::kFloat64:
      return store_as<Real, Float64>(a, out, n);
    case Element::kFloat16:
      return store_as<Real, Float16>(a, out, n);
    case Element::kBFloat16:
      return store_as<Real, BFloat16>(a, out, n);
  }
}

template <class Real>
void multiply_bfloat16(Real* out, const unsigned short* bfloat16, long n) {
#pragma omp simd
  for (long j = 0; j < n; ++j) out[j] *= BFloat16::load(bfloat16[j]);
}

template <class Real>
void scale(Real* out, Real factor, long n) {
#pragma omp simd
  for (long j = 0; j < n; ++j) out[j] *= factor;
}

template <class Real>
void add_wide(double* sums, const Real* a, long n) {
#pragma omp simd
  for (long j = 0; j < n; ++j) sums[j] += static_cast<double>(a[j]);
}

template <class Real>
void add_squares(double* sums, const Real* a, long n) {
#pragma omp simd
  for (long j = 0; j < n; ++j) sums[j] += static_cast<double>(a[j]) * static_cast<double>(a[j]);
}

template <class Real>
constexpr RowKernels<Real> row_kernels() {
  return {
      add<Real>,
      multiply<Real>,
      activate<Real>,
      differentiate<Real>,
      multiply_derivative<Real>,
      count_inactive<Real>,
      load<Real>,
      store<Real>,
      multiply_bfloat16<Real>,
      scale<Real>,
      add_wide<Real>,
      add_squares<Real>};
}

}  // namespace

extern const VectorKernels FEDPFT_KERNELS = {
    FEDPFT_KERNELS_NAME, row_kernels<float>(), row_kernels<double>(), &FEDPFT_STREAMS};

}  // namespace fedpft
