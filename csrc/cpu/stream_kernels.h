// Loops that read a tensor once, in the type it is stored in: memory is what they wait for.
//
// Compiled once per instruction set, like the row loops of vector_kernels.h, which says what that asks of the source.
// Pointers to void are to values of type Element; a row or block has n contiguous values.
#pragma once

#include "../types.h"

namespace fedpft {

struct StreamKernels {
  // energy[j] += sum_i w[j * neuron_stride + i * hidden_stride]^2 for `neurons` neurons. One stride should be 1.
  void (*add_squares)(
      Element, const void* w, long neurons, long hidden, long neuron_stride, long hidden_stride, double* energy);
  // out = half, a row of bfloat16 or float16
  void (*widen)(Element, const void* half, float* out, long n);
  // error += sum (teacher - student)^2, energy += sum teacher^2
  void (*add_errors)(Element, const void* student, const void* teacher, long n, double* error, double* energy);
  // out = (student - teacher) * factor
  void (*error_gradient)(Element, const void* student, const void* teacher, double factor, void* out, long n);
  // Returns scale = max |x| / 127, not finite if a value is not; q = x / scale rounded to nearest even, 0 for 0 / 0.
  float (*quantize)(Element, const void* x, signed char* q, long n);
  // total += weight * (q * scale)
  void (*dequantize_add)(const signed char* q, float scale, float weight, float* total, long n);
};

}  // namespace fedpft
