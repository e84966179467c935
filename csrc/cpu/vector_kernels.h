// Loops over one row of contiguous values: the part of the CPU kernels that is compiled once per instruction set.
//
// Nothing here includes a C++ standard header: an inline function that two instruction sets share would be linked
// once, and the linker might keep the copy that this machine cannot run. A row has n values; `out` may be `a`.
#pragma once

#include "stream_kernels.h"

namespace fedpft {

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
  void (*scale)(Real* out, Real factor, long n);                                 // out *= factor
  void (*add_wide)(double* sums, const Real* a, long n);                         // sums += a
  void (*add_squares)(double* sums, const Real* a, long n);                      // sums += a^2
};

struct VectorKernels {
  const char* name;
  RowKernels<float> float32;
  RowKernels<double> float64;
  const StreamKernels* streams;
};

// The instruction sets that this library was compiled for; CMakeLists.txt defines which.
extern const VectorKernels kBaselineKernels, kAvx2Kernels, kAvx512Kernels;
extern const StreamKernels kBaselineStreams, kAvx2Streams, kAvx512Streams;

}  // namespace fedpft
