// What every .cu file here includes: the CUDA runtime, and one way to launch a kernel.
//
// A .cu file includes no torch header (seconds to compile instead of a minute) and ends in `extern "C"` launchers that
// take raw pointers and a stream and return the error of their launches. Launches go through launch(), never <<<>>>,
// and shared memory has static size: so tests/cuda_emulator/ compiles the same file as plain C++, with headers of the
// same names that stand in for CUDA's, and runs it on a machine without a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fedpft::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class... Parameters, class... Arguments>
cudaError_t launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <class Integer>
__host__ __device__ constexpr Integer divide_up(Integer a, Integer b) {
  return (a + b - 1) / b;
}

}  // namespace fedpft::cuda
