// The pointwise part of an FFN between its multiplies, one pass each way: what runs where no fused multiply
// (ffn_gemm.h) does. ATen multiplies and adds the bias, before z is rounded; these kernels do the rest.
//
//   forward:  hidden = act(z), gated act(g) * z; keeps derivatives in the compact mode; counts |act| <= eps
//   backward: grad_first = grad_hidden * act'(z); gated: grad_hidden * z * act'(g) and grad_hidden * act(g)
//
// Shapes: hidden and gradients (N, K), contiguous; z and what is kept (N, K) with a row distance; counts (K,) int64.
// Accumulation: float32 (float64 for float64); half types are widened on loading and rounded once on storing.
// Determinism: an element is one thread's; counts are sums of integers, so the order of the atomics does not show.
// Bytes moved, per element of (N, K) in a type of s bytes: forward 2 s plain, 3 s gated, compact 2 or 4 more; backward
//   3 s plain, 5 s gated.
// Split: a thread keeps V neighbouring columns (16 bytes where K and the addresses allow, else one) and walks down the
//   rows, so that its counts stay in registers; a block sums them in shared memory, then one atomic a column.
#include <algorithm>
#include <initializer_list>

#include "activation.cuh"
#include "element.h"
#include "sub_ffn.h"

namespace fedpft::cuda {
namespace {

constexpr int kLanes = 32, kWarps = 8, kRowsPerThread = 8;

template <class T, int V>
struct Wides {
  Wide<T> values[V];
};

template <int V, class T>
__device__ inline Wides<T, V> load_wide(const void* base, int64_t offset) {
  const Vector<T, V> narrow = load<V>(static_cast<const T*>(base) + offset);
  Wides<T, V> wide;
  for (int v = 0; v < V; ++v) wide.values[v] = widen(narrow.values[v]);
  return wide;
}

template <int V, class T, class W>
__device__ inline void store_narrow(void* base, int64_t offset, const W (&wide)[V]) {
  Vector<T, V> vector;
  for (int v = 0; v < V; ++v) vector.values[v] = narrow<T>(static_cast<Wide<T>>(wide[v]));
  store(static_cast<T*>(base) + offset, vector);
}

template <class T, int V, Activation A>
__device__ inline void forward_row(const ForwardPass& p, int64_t row, int64_t column, int (&inactive)[V]) {
  const int64_t at_z = row * p.ld_z + column, at_saved = row * p.ld_saved + column;
  const Wides<T, V> first = load_wide<V, T>(p.first, at_z);
  Wides<T, V> second = {};
  if (p.second != nullptr) second = load_wide<V, T>(p.second, at_z);
  Wide<T> hidden[V], active[V], derivative[V];
  for (int v = 0; v < V; ++v) {
    const Activated<Wide<T>> act = activated<A>(first.values[v]);
    active[v] = act.value;
    hidden[v] = p.second != nullptr ? act.value * second.values[v] : act.value;
    derivative[v] = p.second != nullptr ? act.derivative * second.values[v] : act.derivative;
  }
  if (p.counts != nullptr && (p.mask == nullptr || p.mask[row])) {
    for (int v = 0; v < V; ++v) inactive[v] += fabs(active[v]) <= static_cast<Wide<T>>(p.eps) ? 1 : 0;
  }
  if (p.derivative_first != nullptr) store_narrow<V, __nv_bfloat16>(p.derivative_first, at_saved, derivative);
  if (p.derivative_second != nullptr) store_narrow<V, __nv_bfloat16>(p.derivative_second, at_saved, active);
  store_narrow<V, T>(p.hidden, row * p.K + column, hidden);
}

template <class T, int V, Activation A>
__global__ void __launch_bounds__(kLanes* kWarps) forward_pass(ForwardPass p) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x) * V;
  int inactive[V] = {};
  if (column < p.K) {
    const int64_t stride = static_cast<int64_t>(gridDim.y) * kWarps;
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * kWarps + threadIdx.y; row < p.N; row += stride) {
      forward_row<T, V, A>(p, row, column, inactive);
    }
  }
  if (p.counts == nullptr) return;
  __shared__ int partial[kWarps][V][kLanes];  // lanes last: neighbours in different banks
  for (int v = 0; v < V; ++v) partial[threadIdx.y][v][threadIdx.x] = inactive[v];
  __syncthreads();
  for (int v = threadIdx.y; v < V; v += kWarps) {
    unsigned long long sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp][v][threadIdx.x];
    if (column < p.K && sum != 0) atomicAdd(reinterpret_cast<unsigned long long*>(p.counts) + column + v, sum);
  }
}

template <class T, int V, Activation A>
__device__ inline void backward_row(const BackwardPass& p, int64_t row, int64_t column) {
  const int64_t at = row * p.K + column, at_saved = row * p.ld_saved + column;
  const Wides<T, V> grad = load_wide<V, T>(p.grad_hidden, at);
  Wide<T> grad_first[V], grad_second[V];
  if (p.compact) {
    const Wides<__nv_bfloat16, V> first = load_wide<V, __nv_bfloat16>(p.saved_first, at_saved);
    Wides<__nv_bfloat16, V> second = {};
    if (p.saved_second != nullptr) second = load_wide<V, __nv_bfloat16>(p.saved_second, at_saved);
    for (int v = 0; v < V; ++v) {
      grad_first[v] = grad.values[v] * first.values[v];
      grad_second[v] = grad.values[v] * second.values[v];
    }
  } else {
    const Wides<T, V> first = load_wide<V, T>(p.saved_first, at_saved);
    Wides<T, V> second = {};
    if (p.saved_second != nullptr) second = load_wide<V, T>(p.saved_second, at_saved);
    for (int v = 0; v < V; ++v) {
      const Activated<Wide<T>> act = activated<A>(first.values[v]);
      const Wide<T> factor = p.saved_second != nullptr ? second.values[v] : Wide<T>(1);
      grad_first[v] = grad.values[v] * act.derivative * factor;
      grad_second[v] = grad.values[v] * act.value;
    }
  }
  store_narrow<V, T>(p.grad_first, at, grad_first);
  if (p.grad_second != nullptr) store_narrow<V, T>(p.grad_second, at, grad_second);
}

template <class T, int V, Activation A>
__global__ void __launch_bounds__(kLanes* kWarps) backward_pass(BackwardPass p) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x) * V;
  if (column >= p.K) return;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kWarps + threadIdx.y; row < p.N; row += stride) {
    backward_row<T, V, A>(p, row, column);
  }
}

template <class T, int V>
struct ForwardKernels {
  using Kernel = void (*)(ForwardPass);
  static constexpr Kernel of[] = {
      forward_pass<T, V, Activation::kRelu>, forward_pass<T, V, Activation::kGelu>,
      forward_pass<T, V, Activation::kGeluTanh>, forward_pass<T, V, Activation::kSilu>,
      forward_pass<T, V, Activation::kQuickGelu>};
};

template <class T, int V>
struct BackwardKernels {
  using Kernel = void (*)(BackwardPass);
  static constexpr Kernel of[] = {
      backward_pass<T, V, Activation::kRelu>, backward_pass<T, V, Activation::kGelu>,
      backward_pass<T, V, Activation::kGeluTanh>, backward_pass<T, V, Activation::kSilu>,
      backward_pass<T, V, Activation::kQuickGelu>};
};

template <class Pass>
cudaError_t launch_pass(void (*kernel)(Pass), int V, const Pass& pass, cudaStream_t stream) {
  const int64_t columns = divide_up<int64_t>(pass.K, int64_t{kLanes} * V);
  const int64_t rows = std::min<int64_t>(divide_up<int64_t>(pass.N, kWarps * kRowsPerThread), 65535);
  return launch(kernel, dim3(columns, rows), dim3(kLanes, kWarps), stream, pass);
}

// Rows of V elements can be read at once if every row of every matrix starts at a multiple of their size. Derivatives
// are narrower than the other matrices or as wide, so their address is held to more than they need at times.
bool vectors_fit(
    int64_t vector_bytes, int V, std::initializer_list<int64_t> widths, std::initializer_list<const void*> of) {
  return std::all_of(widths.begin(), widths.end(), [&](int64_t width) { return width % V == 0; }) &&
         std::all_of(of.begin(), of.end(), [&](const void* address) { return is_aligned(address, vector_bytes); });
}

}  // namespace

extern "C" cudaError_t fedpft_sub_ffn_forward(const ForwardPass* pass, cudaStream_t stream) {
  const ForwardPass& p = *pass;
  if (p.N == 0 || p.K == 0) return cudaSuccess;
  return with_type(p.element, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = kVectorSize<T>;
    const bool vectors = vectors_fit(
        kVectorBytes, V, {p.K, p.ld_z, p.ld_saved},
        {p.first, p.second, p.hidden, p.derivative_first, p.derivative_second});
    const int act = static_cast<int>(p.activation);
    return vectors ? launch_pass(ForwardKernels<T, V>::of[act], V, p, stream)
                   : launch_pass(ForwardKernels<T, 1>::of[act], 1, p, stream);
  });
}

extern "C" cudaError_t fedpft_sub_ffn_backward(const BackwardPass* pass, cudaStream_t stream) {
  const BackwardPass& p = *pass;
  if (p.N == 0 || p.K == 0) return cudaSuccess;
  return with_type(p.element, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = kVectorSize<T>;
    const bool vectors = vectors_fit(
        kVectorBytes, V, {p.K, p.ld_saved},
        {p.grad_hidden, p.saved_first, p.saved_second, p.grad_first, p.grad_second});
    const int act = static_cast<int>(p.activation);
    return vectors ? launch_pass(BackwardKernels<T, V>::of[act], V, p, stream)
                   : launch_pass(BackwardKernels<T, 1>::of[act], 1, p, stream);
  });
}

}  // namespace fedpft::cuda
