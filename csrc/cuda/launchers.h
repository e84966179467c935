// The launchers of the .cu files: each is what operators.cpp calls for the operator of its name.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../types.h"

extern "C" {

cudaError_t fedpft_dequantize_accumulate(
    float* total, const int8_t* q, const float* scales, float weight, int64_t block, int64_t n, int64_t total_stride,
    int64_t q_stride, int64_t scales_stride, cudaStream_t stream);

}  // extern "C"
