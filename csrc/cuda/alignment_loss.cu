// alignment_loss, alignment_loss_backward: the distance of the student's hidden states from the teacher's.
//
//   loss = sum (t - s)^2 * inverse_energy, inverse_energy = 1 / sum t^2, both sums over tokens under the mask
//   grad_s = (s - t) * 2 * grad * inverse_energy, 0 where the mask is
//
// Shapes: s, t (N, D), any strides; mask (N,) bool or none; grad_s (N, D) contiguous; the others scalars on the
//   device.
// Accumulation: squares in float32 (float64 for float64), at most 32 of them, then float64; one rounding at the end.
// Determinism: a warp sums its rows in order, a block its warps, and a second kernel the blocks; how many there are
//   depends on N alone. No atomics.
// Bytes moved: forward s and t once, and 24 a block; backward s and t once, grad_s once. What the mask hides is not
//   read. Split: a warp has a row at a time. No scalar visits the host, so neither direction waits for the GPU.
#include "element.h"
#include "launchers.h"
#include "reduce.h"

namespace fedpft::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kLoads = 4;  // of a thread and matrix in flight

template <class T>
struct Matrix {
  T* data;
  int64_t row_stride, column_stride;

  __device__ T* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

struct Mask {
  const bool* data;
  int64_t stride;

  __device__ bool operator[](int64_t row) const { return data == nullptr || data[row * stride]; }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    sum_rows(Matrix<const T> student, Matrix<const T> teacher, Mask mask, int64_t N, int64_t D, AlignmentSums* sums) {
  __shared__ double scratch[kWarps];
  const int lane = threadIdx.x % kWarp;
  double error = 0, energy = 0, rows = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; row < N;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    if (!mask[row]) continue;
    if (lane == 0) rows += 1;
    for (int64_t i = lane * V; i < D; i += kLoads * kWarp * V) {
      Vector<T, V> s[kLoads] = {}, t[kLoads] = {};
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const int64_t at = i + k * kWarp * V;
        if (at < D) {
          s[k] = load<V>(student.at(row, at));
          t[k] = load<V>(teacher.at(row, at));
        }
      }
      Wide<T> errors = 0, energies = 0;
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        for (int v = 0; v < V; ++v) {
          const Wide<T> target = widen(t[k].values[v]), difference = target - widen(s[k].values[v]);
          errors += difference * difference;
          energies += target * target;
        }
      }
      error += errors;
      energy += energies;
    }
  }
  error = block_sum<kThreads>(error, scratch);
  energy = block_sum<kThreads>(energy, scratch);
  rows = block_sum<kThreads>(rows, scratch);
  if (threadIdx.x == 0) sums[blockIdx.x] = {error, energy, rows};
}

template <class Real>
__global__ void __launch_bounds__(kThreads)
    finish(const AlignmentSums* sums, int blocks, Real* loss, Real* inverse_energy) {
  __shared__ double scratch[kWarps];
  double error = 0, energy = 0, rows = 0;
  for (int b = threadIdx.x; b < blocks; b += kThreads) {
    error += sums[b].error;
    energy += sums[b].energy;
    rows += sums[b].rows;
  }
  error = block_sum<kThreads>(error, scratch);
  energy = block_sum<kThreads>(energy, scratch);
  rows = block_sum<kThreads>(rows, scratch);
  if (threadIdx.x == 0) {
    const double inverse = rows > 0 ? 1 / energy : 0;
    *inverse_energy = static_cast<Real>(inverse);
    *loss = static_cast<Real>(error * inverse);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) differentiate(
    const Wide<T>* grad, const Wide<T>* inverse_energy, Matrix<const T> student, Matrix<const T> teacher, Mask mask,
    int64_t N, int64_t D, T* grad_student) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= N) return;
  const bool valid = mask[row];
  const Wide<T> factor = 2 * *grad * *inverse_energy;
  for (int64_t i = threadIdx.x % kWarp * V; i < D; i += kLoads * kWarp * V) {
    Vector<T, V> s[kLoads] = {}, t[kLoads] = {};
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int64_t at = i + k * kWarp * V;
      if (valid && at < D) {
        s[k] = load<V>(student.at(row, at));
        t[k] = load<V>(teacher.at(row, at));
      }
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int64_t at = i + k * kWarp * V;
      Vector<T, V> result;
      for (int v = 0; v < V; ++v) {
        const Wide<T> gradient = (widen(s[k].values[v]) - widen(t[k].values[v])) * factor;
        result.values[v] = narrow<T>(valid ? gradient : Wide<T>(0));
      }
      if (at < D) store(grad_student + row * D + at, result);
    }
  }
}

template <class T>
Matrix<const T> matrix(const AlignmentStates& states) {
  return {static_cast<const T*>(states.data), states.row_stride, states.column_stride};
}

template <class T>
bool has_vectors(const AlignmentStates& states, int64_t D) {
  constexpr int V = kVectorSize<T>;
  return states.column_stride == 1 && states.row_stride % V == 0 && D % V == 0 && is_aligned(states.data, kVectorBytes);
}

}  // namespace

extern "C" int64_t fedpft_alignment_loss_blocks(int64_t tokens) {
  constexpr int64_t kMost = 1024;  // more than a GPU holds at once
  const int64_t blocks = divide_up<int64_t>(tokens, kWarps);
  return blocks < kMost ? blocks : kMost;
}

extern "C" cudaError_t fedpft_alignment_loss(
    Element element, AlignmentStates student, AlignmentStates teacher, const bool* mask, int64_t mask_stride, int64_t N,
    int64_t D, AlignmentSums* sums, void* loss, void* inverse_energy, cudaStream_t stream) {
  const int64_t blocks = fedpft_alignment_loss_blocks(N);
  return with_type(element, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = kVectorSize<T>;
    if (blocks != 0) {
      const bool vectors = has_vectors<T>(student, D) && has_vectors<T>(teacher, D);
      const cudaError_t error = launch(
          vectors ? sum_rows<T, V> : sum_rows<T, 1>, dim3(blocks), dim3(kThreads), stream, matrix<T>(student),
          matrix<T>(teacher), Mask{mask, mask_stride}, N, D, sums);
      if (error != cudaSuccess) return error;
    }
    return launch(
        finish<Wide<T>>, dim3(1), dim3(kThreads), stream, sums, static_cast<int>(blocks), static_cast<Wide<T>*>(loss),
        static_cast<Wide<T>*>(inverse_energy));
  });
}

extern "C" cudaError_t fedpft_alignment_loss_backward(
    Element element, const void* grad, const void* inverse_energy, AlignmentStates student, AlignmentStates teacher,
    const bool* mask, int64_t mask_stride, int64_t N, int64_t D, void* grad_student, cudaStream_t stream) {
  if (N == 0 || D == 0) return cudaSuccess;
  return with_type(element, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = kVectorSize<T>;
    const bool vectors =
        has_vectors<T>(student, D) && has_vectors<T>(teacher, D) && is_aligned(grad_student, kVectorBytes);
    return launch(
        vectors ? differentiate<T, V> : differentiate<T, 1>, dim3(divide_up<int64_t>(N, kWarps)), dim3(kThreads),
        stream, static_cast<const Wide<T>*>(grad), static_cast<const Wide<T>*>(inverse_energy), matrix<T>(student),
        matrix<T>(teacher), Mask{mask, mask_stride}, N, D, static_cast<T*>(grad_student));
  });
}

}  // namespace fedpft::cuda
