// dequantize_accumulate: adds a quantised update to a running sum, in place.
//
//   total[i] += weight * (scales[i / block] * q[i])
//
// Shapes: total (n,) float32, q (n,) int8, scales (ceil(n / block),) float32; any strides.
// Accumulation: float32, one rounding of scale * q and one of the sum (fused multiply-add).
// Determinism: every element is one thread's; no atomics.
// Bytes moved: 9 an element (q, total in, total out) and 4 a block.
// Split: a thread takes four neighbours, so that a warp reads 128 bytes of q and 512 of total at once.
#include "element.h"
#include "launchers.h"

namespace fedpft::cuda {
namespace {

constexpr int kThreads = 256;

struct Strides {
  int64_t total, q, scales;
};

// Index: 32 bits where they suffice, because the division by the block size costs several times as much in 64.
template <int V, class Index>
__global__ void __launch_bounds__(kThreads) accumulate(
    float* total, const int8_t* q, const float* scales, float weight, Index block, Index n, Strides strides) {
  const Index first = (static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (first >= n) return;
  if (V > 1 && n - first >= V) {  // contiguous, and no quantised block ends between the neighbours
    const float factor = scales[first / block];
    const auto steps = load<V>(q + first);
    auto sums = load<V>(total + first);
    for (int v = 0; v < V; ++v) sums.values[v] = fmaf(weight, factor * steps.values[v], sums.values[v]);
    store(total + first, sums);
    return;
  }
  for (Index i = first; i < n && i - first < V; ++i) {
    float* sum = total + i * strides.total;
    *sum = fmaf(weight, scales[i / block * strides.scales] * q[i * strides.q], *sum);
  }
}

}  // namespace

extern "C" cudaError_t fedpft_dequantize_accumulate(
    float* total, const int8_t* q, const float* scales, float weight, int64_t block, int64_t n, int64_t total_stride,
    int64_t q_stride, int64_t scales_stride, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  constexpr int V = kVectorSize<float>;
  const bool vectors = total_stride == 1 && q_stride == 1 && scales_stride == 1 && block % V == 0 &&
                       is_aligned(total, kVectorBytes) && is_aligned(q, V);
  const auto run = [&](auto kernel, auto index, int per_thread) {
    using Index = decltype(index);
    const int64_t blocks = divide_up<int64_t>(n, int64_t{kThreads} * per_thread);
    return launch(
        kernel, dim3(blocks), dim3(kThreads), stream, total, q, scales, weight, static_cast<Index>(block),
        static_cast<Index>(n), Strides{total_stride, q_stride, scales_stride});
  };
  // Headroom for the threads of the last block, whose first element lies beyond n.
  if (n < (int64_t{1} << 31) && block < (int64_t{1} << 31)) {
    return vectors ? run(accumulate<V, uint32_t>, uint32_t{}, V) : run(accumulate<1, uint32_t>, uint32_t{}, 1);
  }
  return vectors ? run(accumulate<V, uint64_t>, uint64_t{}, V) : run(accumulate<1, uint64_t>, uint64_t{}, 1);
}

}  // namespace fedpft::cuda
