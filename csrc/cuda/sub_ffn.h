// The launchers of sub_ffn.cu. N tokens, K neurons; ld_* is the distance of two rows in elements. A second matrix
// exists in a gated FFN: first is then the gate, second what it is multiplied with.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../types.h"

namespace fedpft::cuda {

struct ForwardPass {
  Element element;
  Activation activation;
  int64_t N, K;
  const void *first, *second;  // (N, K) pre-activations, ld_z; second may be null
  int64_t ld_z;
  void* hidden;                                // (N, K) contiguous; may be `first`
  void *derivative_first, *derivative_second;  // (N, K) bfloat16, ld_saved, or null
  int64_t ld_saved;
  int64_t* counts;   // (K,) added to, or null
  const bool* mask;  // (N,) or null: all tokens count
  double eps;
};

struct BackwardPass {
  Element element;
  Activation activation;
  int64_t N, K;
  const void* grad_hidden;                 // (N, K) contiguous
  const void *saved_first, *saved_second;  // (N, K), ld_saved: pre-activations or, compact, bfloat16 derivatives
  int64_t ld_saved;
  bool compact;
  void *grad_first, *grad_second;  // (N, K) contiguous; one of them may be grad_hidden
};

}  // namespace fedpft::cuda

extern "C" {
cudaError_t fedpft_sub_ffn_forward(const fedpft::cuda::ForwardPass* pass, cudaStream_t stream);
cudaError_t fedpft_sub_ffn_backward(const fedpft::cuda::BackwardPass* pass, cudaStream_t stream);
}
