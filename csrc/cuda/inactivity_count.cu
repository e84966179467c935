// inactivity_count: at how many tokens each neuron is inactive.
//
//   counts[j] += sum over tokens i under the mask of ( |act(z[i, j])| <= eps )
//
// Shapes: z (N, F), any strides; mask (N,) bool or none; counts (F,) int64, zero before.
// Activation: not evaluated on the device. GELU and SiLU fall to one minimum and rise from there, so the inactive z
//   are two intervals; the host finds their ends to the last bit, and the device compares. |act(z)| is meant as
//   rounded from float64 to float32 (float64 for float64), and GELU keeps its tail, as on the CPU.
// Determinism: counts are sums of integers.
// Bytes moved: z once; 8 F written. Memory-bound in every type, where act itself would not be.
// Split: a block has a tile of neurons, 64 bytes of a row wide, and every gridDim.y-th group of rows; it adds to
//   counts once a neuron.
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "element.h"
#include "launchers.h"
#include "reduce.h"

namespace fedpft::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTileBytes = 64;
constexpr int kLoads = 4;  // of a thread in flight

template <class T>
constexpr int kTile = kTileBytes / static_cast<int>(sizeof(T));

// Inactive: lowest <= z <= falling, or rising <= z <= highest. A value that is not a number is neither.
template <class Real>
struct Intervals {
  Real lowest, falling, rising, highest;

  __host__ __device__ bool contain(Real z) const {
    return (z >= lowest && z <= falling) || (z >= rising && z <= highest);
  }
};

double activate(Activation activation, double z) {
  switch (activation) {
    case Activation::kRelu:
      return z > 0 ? z : 0;
    case Activation::kGelu:
      return 0.5 * z * std::erfc(-z * 0.70710678118654752440);
    case Activation::kGeluTanh:  // 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), without cancellation
      return z / (1 + std::exp(-1.59576912160573071176 * (z + 0.044715 * z * z * z)));
    case Activation::kSilu:
      return z / (1 + std::exp(-z));
  }
  return z;
}

// The last z from `from` towards `to` that `holds`, which must do so at `from` and up to one place.
template <class Real, class Holds>
Real last(Real from, Real to, const Holds& holds) {
  // Floating-point numbers in order are whole numbers in order, so 32 or 64 halvings end at neighbours.
  using Integer = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
  const auto order = [](Real x) {
    Integer bits;
    std::memcpy(&bits, &x, sizeof(x));
    return bits < 0 ? std::numeric_limits<Integer>::min() - bits : bits;
  };
  const auto value = [](Integer place) {
    const Integer bits = place < 0 ? std::numeric_limits<Integer>::min() - place : place;
    Real x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  };
  if (holds(to)) return to;
  Integer good = order(from), bad = order(to);
  while (true) {
    const Integer middle = (good & bad) + ((good ^ bad) >> 1);  // without overflow; rounded down
    if (middle == good || middle == bad) return value(good);
    (holds(value(middle)) ? good : bad) = middle;
  }
}

template <class Real>
Intervals<Real> inactive(Activation activation, double eps) {
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity(), kLowest = std::numeric_limits<Real>::lowest();
  const Real most = static_cast<Real>(eps);
  if (activation == Activation::kRelu) return {-kInfinity, most, kInfinity, -kInfinity};
  const Real minimum = activation == Activation::kSilu   ? Real(-1.2784645)
                       : activation == Activation::kGelu ? Real(-0.7517916)
                                                         : Real(-0.7524614);
  const auto act = [&](Real z) { return static_cast<Real>(activate(activation, z)); };
  const auto above = [&](Real z) { return act(z) >= -most; };
  const auto below = [&](Real z) { return act(z) <= most; };
  // act(-infinity) is not a number, as in the reference.
  return {kLowest, last(kLowest, minimum, above), last(Real(0), minimum, above), last(Real(0), kInfinity, below)};
}

struct Rows {
  int64_t count, stride;
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) count_inactive(
    const T* z, Rows tokens, Rows neurons, const bool* mask, int64_t mask_stride, Intervals<Wide<T>> intervals,
    unsigned long long* counts) {
  __shared__ int partial[kWarps][kTile<T>];
  constexpr int kLanes = kTile<T> / V, kRows = kThreads / kLanes;  // threads side by side, rows at once
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile<T>;
  const int column = threadIdx.x % kLanes * V, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int found[V] = {};
  if (first + column < neurons.count) {
    const T* const base = z + (first + column) * neurons.stride;
    const int64_t step = static_cast<int64_t>(gridDim.y) * kRows;
    for (int64_t i = static_cast<int64_t>(blockIdx.y) * kRows + threadIdx.x / kLanes; i < tokens.count;
         i += kLoads * step) {
      Vector<T, V> loaded[kLoads] = {};
      bool counts_here[kLoads] = {};
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const int64_t at = i + k * step;
        counts_here[k] = at < tokens.count && (mask == nullptr || mask[at * mask_stride]);
        if (counts_here[k]) loaded[k] = load<V>(base + at * tokens.stride);
      }
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        for (int v = 0; v < V; ++v) found[v] += counts_here[k] && intervals.contain(widen(loaded[k].values[v]));
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    found[v] = warp_sum(found[v], kLanes);
    if (lane < kLanes) partial[warp][column + v] = found[v];
  }
  __syncthreads();
  if (threadIdx.x < kTile<T> && first + threadIdx.x < neurons.count) {
    int total = 0;
    for (int w = 0; w < kWarps; ++w) total += partial[w][threadIdx.x];
    if (total != 0) atomicAdd(counts + first + threadIdx.x, static_cast<unsigned long long>(total));
  }
}

template <class T, int V>
cudaError_t run(
    const T* z, Rows tokens, Rows neurons, const bool* mask, int64_t mask_stride, Activation activation, double eps,
    int64_t* counts, cudaStream_t stream) {
  constexpr int64_t kRowsPerBlock = int64_t{kThreads} / (kTile<T> / V) * kLoads, kMostBlocks = 65535;
  const int64_t blocks = divide_up(tokens.count, kRowsPerBlock);
  const dim3 grid(divide_up<int64_t>(neurons.count, kTile<T>), blocks < kMostBlocks ? blocks : kMostBlocks);
  return launch(
      count_inactive<T, V>, grid, dim3(kThreads), stream, z, tokens, neurons, mask, mask_stride,
      inactive<Wide<T>>(activation, eps), reinterpret_cast<unsigned long long*>(counts));
}

}  // namespace

extern "C" cudaError_t fedpft_inactivity_count(
    Element element, const void* z, int64_t tokens, int64_t neurons, int64_t token_stride, int64_t neuron_stride,
    const bool* mask, int64_t mask_stride, Activation activation, double eps, int64_t* counts, cudaStream_t stream) {
  if (tokens == 0 || neurons == 0) return cudaSuccess;
  return with_type(element, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = kVectorSize<T>;
    const bool vectors = neuron_stride == 1 && neurons % V == 0 && token_stride % V == 0 && is_aligned(z, kVectorBytes);
    return (vectors ? run<T, V> : run<T, 1>)(static_cast<const T*>(z), Rows{tokens, token_stride},
                                             Rows{neurons, neuron_stride}, mask, mask_stride, activation, eps, counts,
                                             stream);
  });
}

}  // namespace fedpft::cuda
