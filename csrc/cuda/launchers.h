// The launchers of the .cu files: what operators.cpp calls for the operator of the same name. Strides are in elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../types.h"

namespace fedpft::cuda {

// One projection of one layer, neuron by neuron, whichever way it lies in memory.
struct SaliencyWeight {
  const void* data;
  int64_t hidden, neuron_stride, hidden_stride;
};

// Hidden states (N, D).
struct AlignmentStates {
  const void* data;
  int64_t row_stride, column_stride;
};

// Of one block of rows; `rows` counts those under the mask.
struct AlignmentSums {
  double error, energy, rows;
};

// What an FFN's neurons pass on for some tokens, and the sums over tokens that it goes into. Null: not wanted or not
// there.
struct ActivationMoments {
  Element element;
  const void* hidden;  // (tokens, neurons) contiguous
  int64_t tokens, neurons;
  const bool* mask;
  int64_t mask_stride;
  const void* shares;  // float32, or float64 for float64
  int64_t shares_stride;
  double *values, *total, *squares;  // (tokens, neurons), (neurons,), (neurons,)
};

extern "C" {

cudaError_t fedpft_activation_moments(const ActivationMoments* pass, cudaStream_t stream);

// Adds the upper triangle of (rows, columns), contiguous.
cudaError_t fedpft_activation_products(
    const double* product, int64_t rows, int64_t columns, double* second, int64_t ld_second, cudaStream_t stream);

// weights: (layers, parts); result: (layers, neurons).
cudaError_t fedpft_neuron_saliency(
    Element element, const SaliencyWeight* weights, int parts, int64_t layers, int64_t neurons, float* result,
    cudaStream_t stream);

// counts must be 0 before.
cudaError_t fedpft_inactivity_count(
    Element element, const void* z, int64_t tokens, int64_t neurons, int64_t token_stride, int64_t neuron_stride,
    const bool* mask, int64_t mask_stride, Activation activation, double eps, int64_t* counts, cudaStream_t stream);

// How many `sums` alignment_loss needs.
int64_t fedpft_alignment_loss_blocks(int64_t tokens);

// loss, inverse_energy: float32, or float64 for float64.
cudaError_t fedpft_alignment_loss(
    Element element, AlignmentStates student, AlignmentStates teacher, const bool* mask, int64_t mask_stride, int64_t N,
    int64_t D, AlignmentSums* sums, void* loss, void* inverse_energy, cudaStream_t stream);

cudaError_t fedpft_alignment_loss_backward(
    Element element, const void* grad, const void* inverse_energy, AlignmentStates student, AlignmentStates teacher,
    const bool* mask, int64_t mask_stride, int64_t N, int64_t D, void* grad_student, cudaStream_t stream);

cudaError_t fedpft_quantize_blocks(
    Element element, const void* x, int64_t n, int64_t stride, int64_t block, int8_t* q, float* scales,
    cudaStream_t stream);

cudaError_t fedpft_dequantize_accumulate(
    float* total, const int8_t* q, const float* scales, float weight, int64_t block, int64_t n, int64_t total_stride,
    int64_t q_stride, int64_t scales_stride, cudaStream_t stream);

}  // extern "C"

}  // namespace fedpft::cuda
