// Sums within a warp and within a block, in an order that does not depend on timing.
#pragma once

#include "launch.h"

namespace fedpft::cuda {

// Over the lanes whose numbers are equal modulo `apart`; every one of them gets the sum.
template <class T>
__device__ inline T warp_sum(T value, int apart = 1) {
  for (int distance = apart; distance < kWarp; distance *= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Over the block, for its thread 0; `scratch` has one place a warp. Ends with a barrier, so scratch may be used again.
template <int kThreads, class T>
__device__ inline T block_sum(T value, T* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  value = warp_sum(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / kWarp; ++w) value += scratch[w];
  }
  __syncthreads();
  return value;
}

}  // namespace fedpft::cuda
