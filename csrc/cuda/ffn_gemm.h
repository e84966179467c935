// The first multiply of an FFN's forward and of its backward, with everything pointwise in its epilogue.
//
// N tokens, D hidden size, K neurons. Matrices are row-major; ld_* is the distance of two rows in elements. bfloat16 or
// float16 in and out, float32 accumulation; dimensions and distances are multiples of 8, pointers aligned to 16 bytes.
// `saved` holds 16-bit words: values of the matrices' type (exact) or bfloat16 derivatives (compact).
#pragma once

#include <cstdint>

#include "../types.h"

namespace fedpft::cuda {

// z = x w^T + bias and, by `gate` and `linear`:
//   plain: hidden = act(z), saved_first = z or act'(z), counts over act(z)
//   linear, the gate of a gated FFN: hidden = z, counts over act(z)
//   gate given: hidden = act(gate) * z; exact: saved_first = z; compact: saved_first = act'(gate) * z and
//     saved_second = act(gate)
struct ForwardGemm {
  int N, K, D;
  const void *x, *w, *bias, *gate;  // (N, D), (K, D), (K,) or null, (N, K) or null
  int64_t ld_x, ld_w;
  void* hidden;                      // (N, K)
  void *saved_first, *saved_second;  // (N, K) or null
  int* counts;                       // (K,) zeroed by the caller, or null
  const unsigned char* mask;         // (N,) or null: all tokens count
  Activation activation;
  float eps;
  bool linear, compact;
};

// grad_hidden = grad_y w_out^T is never stored:
//   plain: grad_first = grad_hidden * act'(saved_first)            compact: grad_hidden * saved_first
//   gated: grad_first = grad_hidden * saved_second * act'(saved_first), grad_second = grad_hidden * act(saved_first)
//          compact: grad_hidden * saved_first and grad_hidden * saved_second
struct BackwardGemm {
  int N, K, D;
  const void *grad_y, *w_out;  // (N, D), (K, D)
  int64_t ld_grad_y, ld_w_out;
  const void *saved_first, *saved_second;  // (N, K); second null: plain
  int64_t ld_saved;
  void *grad_first, *grad_second;  // (N, K); second null: plain
  Activation activation;
  bool compact;
};

// Each returns null, or what went wrong. They enqueue on the stream, allocate nothing and keep nothing.
using ForwardLauncher = const char* (*)(const ForwardGemm&, void* stream);
using BackwardLauncher = const char* (*)(const BackwardGemm&, void* stream);

const char* forward_gemm_sm90_bfloat16(const ForwardGemm&, void* stream);
const char* forward_gemm_sm90_float16(const ForwardGemm&, void* stream);
const char* backward_gemm_sm90_bfloat16(const BackwardGemm&, void* stream);
const char* backward_gemm_sm90_float16(const BackwardGemm&, void* stream);

}  // namespace fedpft::cuda
