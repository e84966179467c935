// neuron_saliency: the importance of every FFN neuron, for all layers in one launch.
//
//   s[l, j] = sqrt( sum_i w_in[l][j, i]^2 + sum_i w_gate[l][j, i]^2 + sum_i w_out[l][i, j]^2 )
//
// Shapes: L layers; w_in, w_gate (F, D), w_out (D, F), any strides; s (L, F) float32.
// Accumulation: squares of widened values (float32; float64 for float64), at most 32 of them, then float64.
// Determinism: every neuron is summed by one block, in an order that depends on D and the layout alone; no atomics.
// Bytes moved: every weight once, nothing is copied or transposed; 4 L F are written.
// Split: a block has a tile of neurons that are 64 bytes of a row of w_out wide, in one layer. Where a neuron's weights
//   lie side by side, a warp reads a neuron; where neurons lie side by side, a warp reads the tile's part of 8 rows.
//   One layer of 11008 neurons in bfloat16 makes 344 blocks, each with 256 threads and 64 bytes a thread in
//   flight: enough for the bandwidth of 132 multiprocessors without a second stage.
// Layers whose weights lie alike share a launch, up to 128 of them: their addresses travel as kernel parameters (3 KiB
//   of 4), so there is nothing to copy to the device and a CUDA graph keeps them.
#include <algorithm>

#include "element.h"
#include "launchers.h"
#include "reduce.h"

namespace fedpft::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kResident = 3;  // blocks on a multiprocessor, so that a layer of 11008 neurons has no second wave
constexpr int kTileBytes = 64, kMostLayers = 128, kMostParts = 3;
constexpr int kLoads = 4;  // of a thread in flight

template <class T>
constexpr int kTile = kTileBytes / static_cast<int>(sizeof(T));

enum class Order { kNeuronVectors, kNeurons, kTileVectors, kTiles };  // which weights lie side by side, and how to load

struct Part {
  int64_t hidden, neuron_stride, hidden_stride;
  Order order;

  bool operator==(const Part& other) const {
    return hidden == other.hidden && neuron_stride == other.neuron_stride && hidden_stride == other.hidden_stride &&
           order == other.order;
  }
};

struct Parts {
  int count;
  Part parts[kMostParts];
  const void* weights[kMostParts][kMostLayers];
};
static_assert(sizeof(Parts) + 16 <= 4096, "what every driver takes as parameters of a kernel");

template <class T, int V>
__device__ inline Wide<T> sum_of_squares(const Vector<T, V>& vector) {
  Wide<T> sum = 0;
  for (int v = 0; v < V; ++v) sum += widen(vector.values[v]) * widen(vector.values[v]);
  return sum;
}

template <class T, int V>
__device__ void add_neurons(const T* weight, const Part& part, int count, double* energy) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int j = warp; j < count; j += kWarps) {
    const T* neuron = weight + j * part.neuron_stride;
    double sum = 0;
    for (int64_t i = lane * V; i < part.hidden; i += kLoads * kWarp * V) {
      Vector<T, V> loaded[kLoads] = {};
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const int64_t at = i + k * kWarp * V;
        if (at < part.hidden) loaded[k] = load<V>(neuron + at * part.hidden_stride);
      }
      Wide<T> squares = 0;
#pragma unroll
      for (int k = 0; k < kLoads; ++k) squares += sum_of_squares(loaded[k]);
      sum += squares;
    }
    sum = warp_sum(sum);
    if (lane == 0) energy[j] += sum;
  }
}

template <class T, int V>
__device__ void add_tile(const T* weight, const Part& part, int count, double* energy, double (*partial)[kTile<T>]) {
  constexpr int kLanes = kTile<T> / V, kRows = kThreads / kLanes;  // threads side by side, rows at once
  const int column = threadIdx.x % kLanes * V, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double sums[V] = {};
  if (column < count) {
    for (int64_t i = threadIdx.x / kLanes; i < part.hidden; i += kLoads * kRows) {
      Vector<T, V> loaded[kLoads] = {};
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const int64_t at = i + k * kRows;
        if (at < part.hidden) loaded[k] = load<V>(weight + at * part.hidden_stride + column);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        Wide<T> squares = 0;
#pragma unroll
        for (int k = 0; k < kLoads; ++k) squares += widen(loaded[k].values[v]) * widen(loaded[k].values[v]);
        sums[v] += squares;
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    sums[v] = warp_sum(sums[v], kLanes);
    if (lane < kLanes) partial[warp][column + v] = sums[v];
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < count) {
    for (int w = 0; w < kWarps; ++w) energy[threadIdx.x] += partial[w][threadIdx.x];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    saliency(const __grid_constant__ Parts parts, int64_t neurons, float* result) {
  __shared__ double energy[kTile<T>], partial[kWarps][kTile<T>];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile<T>;
  const int count = neurons - first < kTile<T> ? static_cast<int>(neurons - first) : kTile<T>;
  if (threadIdx.x < kTile<T>) energy[threadIdx.x] = 0;
  for (int p = 0; p < parts.count; ++p) {
    const Part& part = parts.parts[p];
    const T* weight = static_cast<const T*>(parts.weights[p][blockIdx.y]) + first * part.neuron_stride;
    __syncthreads();  // of the part before: energy has other owners now, and partial is free again
    switch (part.order) {
      case Order::kNeuronVectors:
        add_neurons<T, kVectorSize<T>>(weight, part, count, energy);
        break;
      case Order::kNeurons:
        add_neurons<T, 1>(weight, part, count, energy);
        break;
      case Order::kTileVectors:
        add_tile<T, kVectorSize<T>>(weight, part, count, energy, partial);
        break;
      case Order::kTiles:
        add_tile<T, 1>(weight, part, count, energy, partial);
        break;
    }
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < count) {
    result[blockIdx.y * neurons + first + threadIdx.x] = static_cast<float>(sqrt(energy[threadIdx.x]));
  }
}

template <class T>
Part part_of(const SaliencyWeight& weight, int64_t neurons) {
  constexpr int V = kVectorSize<T>;
  const int64_t size = sizeof(T);
  Part part{weight.hidden, weight.neuron_stride, weight.hidden_stride, Order::kNeurons};
  const bool side_by_side = weight.hidden_stride == 1, tiles = !side_by_side && weight.neuron_stride == 1;
  const bool aligned = is_aligned(weight.data, kVectorBytes);
  if (tiles) {
    const bool vectors = aligned && neurons % V == 0 && weight.hidden_stride * size % kVectorBytes == 0;
    part.order = vectors ? Order::kTileVectors : Order::kTiles;
  } else if (side_by_side && aligned && weight.hidden % V == 0 && weight.neuron_stride * size % kVectorBytes == 0) {
    part.order = Order::kNeuronVectors;
  }
  return part;
}

template <class T>
cudaError_t run(
    const SaliencyWeight* weights, int parts, int64_t layers, int64_t neurons, float* result, cudaStream_t stream) {
  for (int64_t first = 0, next = 0; first < layers; first = next) {
    Parts together = {};
    together.count = parts;
    for (; next < layers && next - first < kMostLayers; ++next) {
      Part layer[kMostParts] = {};
      for (int p = 0; p < parts; ++p) layer[p] = part_of<T>(weights[next * parts + p], neurons);
      if (next > first && !std::equal(layer, layer + parts, together.parts)) break;
      std::copy(layer, layer + parts, together.parts);
      for (int p = 0; p < parts; ++p) together.weights[p][next - first] = weights[next * parts + p].data;
    }
    const dim3 grid(divide_up<int64_t>(neurons, kTile<T>), next - first);
    const cudaError_t error =
        launch(saliency<T>, grid, dim3(kThreads), stream, together, neurons, result + first * neurons);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

extern "C" cudaError_t fedpft_neuron_saliency(
    Element element, const SaliencyWeight* weights, int parts, int64_t layers, int64_t neurons, float* result,
    cudaStream_t stream) {
  if (neurons == 0) return cudaSuccess;
  return with_type(element, [&](auto type) {
    return run<typename decltype(type)::type>(weights, parts, layers, neurons, result, stream);
  });
}

}  // namespace fedpft::cuda
