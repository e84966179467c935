// The first multiply of an FFN's forward and of its backward, with everything pointwise in its epilogue.
//
// N tokens, D hidden size, K neurons. Matrices are row-major; ld_* is the distance of two rows in elements. bfloat16 or
// float16 in and out, float32 accumulation; dimensions and distances are multiples of 8, pointers aligned to 16 bytes.
// `saved` holds 16-bit words: values of the matrices' type (exact) or bfloat16 derivatives (compact).
#pragma once

#include <cuda_runtime_api.h>

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
  int64_t ld_x, ld_w, ld_gate;
  void* hidden;  // (N, K)
  int64_t ld_hidden;
  void *saved_first, *saved_second;  // (N, K) or null
  int64_t ld_saved;
  int64_t* counts;   // (K,) added to, or null
  const bool* mask;  // (N,) or null: all tokens count
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

// Both enqueue on the stream, allocate nothing and keep nothing. They return null, or what went wrong.
struct FfnGemms {
  const char* (*forward)(const ForwardGemm&, cudaStream_t stream);
  const char* (*backward)(const BackwardGemm&, cudaStream_t stream);
};

// Those of a half type for the current device, if FEDPFT_FUSED_FFN is 1; null if this library has none for it.
const FfnGemms* ffn_gemms(Element element);

extern const FfnGemms kSm80BFloat16, kSm80Float16, kSm90BFloat16, kSm90Float16;

}  // namespace fedpft::cuda
