// quantize_blocks: rounds to 8 bits, with one scale for each block of consecutive values.
//
//   scales[b] = max|x| / 127 over the block        q[i] = clamp(round(x[i] / scales[b]), -127, 127)
//
// Shapes: x (n,), any stride; q (n,) int8, scales (ceil(n / block),) float32, contiguous.
// Arithmetic: float32, whatever x is; true divisions, round half to even, as the reference. x / 0 of a block of zeros
//   is not a number and becomes 0. Absolute values are compared as the integers of their bits, where infinity is
//   above all numbers and what is not a number above infinity: so the scale of such a block is not finite.
// Determinism: a maximum has no order.
// Bytes moved: x once from memory (the second look at a block finds it in the cache), 1 an element and 4 a block
//   written. Split: a warp has a block of up to 4096 values, else a thread block.
#include "element.h"
#include "launchers.h"

namespace fedpft::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kMostOfAWarp = 4096;

__device__ inline unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }

__device__ inline unsigned size_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

template <int kGroup>
__device__ unsigned group_max(unsigned value) {
  for (int distance = 1; distance < kWarp; distance *= 2) {
    value = larger(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  if (kGroup > kWarp) {
    __shared__ unsigned scratch[kWarps];
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) value = larger(value, scratch[w]);
  }
  return value;
}

__device__ inline int8_t quantize(float x, float scale) {
  const float steps = x / scale;
  return static_cast<int8_t>(steps != steps ? 0.0f : fminf(fmaxf(rintf(steps), -127.0f), 127.0f));
}

// kGroup threads have a block of values.
template <class T, int V, int kGroup>
__global__ void __launch_bounds__(kThreads)
    quantize_groups(const T* x, int64_t n, int64_t stride, int64_t block, int64_t blocks, int8_t* q, float* scales) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup;
  if (b >= blocks) return;  // a whole warp or nobody
  const int64_t start = b * block, end = n - start < block ? n : start + block;
  const int64_t mine = start + threadIdx.x % kGroup * V;
  // The last block may end within a vector.
  const int64_t vectors_end = start + (end - start) / V * V;
  unsigned most = 0;
#pragma unroll 2
  for (int64_t i = mine; i < vectors_end; i += kGroup * V) {
    const auto values = load<V>(x + i * stride);
    for (int v = 0; v < V; ++v) most = larger(most, size_bits(static_cast<float>(widen(values.values[v]))));
  }
  for (int64_t i = vectors_end + threadIdx.x % kGroup; i < end; i += kGroup) {
    most = larger(most, size_bits(static_cast<float>(widen(x[i * stride]))));
  }
  const float scale = __uint_as_float(group_max<kGroup>(most)) / 127.0f;
  if (threadIdx.x % kGroup == 0) scales[b] = scale;
#pragma unroll 1
  for (int64_t i = mine; i < vectors_end; i += kGroup * V) {
    const auto values = load<V>(x + i * stride);
    Vector<int8_t, V> steps;
    for (int v = 0; v < V; ++v) steps.values[v] = quantize(static_cast<float>(widen(values.values[v])), scale);
    store(q + i, steps);
  }
  for (int64_t i = vectors_end + threadIdx.x % kGroup; i < end; i += kGroup) {
    q[i] = quantize(static_cast<float>(widen(x[i * stride])), scale);
  }
}

}  // namespace

extern "C" cudaError_t fedpft_quantize_blocks(
    Element element, const void* x, int64_t n, int64_t stride, int64_t block, int8_t* q, float* scales,
    cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t blocks = n / block + (n % block != 0);
  return with_type(element, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = kVectorSize<T>;
    const bool vectors = stride == 1 && block % V == 0 && is_aligned(x, kVectorBytes) && is_aligned(q, V);
    const bool warps = block <= kMostOfAWarp;
    const auto kernel = warps ? (vectors ? quantize_groups<T, V, kWarp> : quantize_groups<T, 1, kWarp>)
                              : (vectors ? quantize_groups<T, V, kThreads> : quantize_groups<T, 1, kThreads>);
    return launch(
        kernel, dim3(warps ? divide_up<int64_t>(blocks, kWarps) : blocks), dim3(kThreads), stream,
        static_cast<const T*>(x), n, stride, block, blocks, q, scales);
  });
}

}  // namespace fedpft::cuda
