// Loops over one row of contiguous values: the part of the CPU kernels that is compiled once per instruction set.
//
// Nothing here includes a C++ standard header: an inline function that two instruction sets share would be linked
// once, and the linker might keep the copy that this machine cannot run. A row has n values; `out` may be `a`.
#pragma once

namespace fedpft {

enum class Activation : int { kRelu, kGelu, kGeluTanh, kSilu };
enum class Element : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

template <class Real>
struct RowKernels {
  void (*add)(Real* out, const Real* a, long n);                              // out += a
  void (*multiply)(Real* out, const Real* a, long n);                         // out *= a
  void (*activate)(Activation, const Real* z, Real* out, long n);             // out = act(z)
  void (*differentiate)(Activation, const Real* z, Real* out, long n);        // out = act'(z)
  void (*multiply_derivative)(Activation, const Real* z, Real* out, long n);  // out *= act'(z)
  void (*count_inactive)(const Real* active, Real eps, int* counts, long n);  // counts += |active| <= eps
  // out[j] = a[j * stride] or, with an index, a[index[j] * stride], widened
  void (*load)(Element, const void* a, const long* index, long stride, Real* out, long n);
  void (*store)(Element, const Real* a, void* out, long n);                      // out = a, rounded to nearest even
  void (*multiply_bfloat16)(Real* out, const unsigned short* bfloat16, long n);  // out *= bfloat16
};

struct VectorKernels {
  const char* name;
  RowKernels<float> float32;
  RowKernels<double> float64;
  // energy[j] += sum_i w[j * neuron_stride + i * hidden_stride]^2 for `neurons` neurons. One stride should be 1.
  void (*add_squares)(
      Element, const void* w, long neurons, long hidden, long neuron_stride, long hidden_stride, double* energy);
};

// The instruction sets that this library was compiled for; CMakeLists.txt defines which.
extern const VectorKernels kBaselineKernels;
extern const VectorKernels kAvx2Kernels;
extern const VectorKernels kAvx512Kernels;

}  // namespace fedpft
