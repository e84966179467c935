// activation_moments: what stands between the FFN's activations and the sums of their moments. The host code is in
// sub_ffn.cpp, beside that of the FFN, whose multiplies and passes make h.
//
//   moments:  h = s h at tokens under the mask, else 0; total_j += sum of h_j; second_j += sum of h_j^2, or h is kept
//   products: second_ij += product_ij for i <= j
//
// Shapes: hidden (N, F) contiguous; mask, s (N,), any stride; total (F,), second (F,) or (F, F), values (N, F):
// float64. Accumulation: float64. What is kept is float64 too: the GPUs that this is built for multiply float64 on
// tensor cores
//   as fast as float32 without TF32, and no setting of torch changes what they do.
// Determinism: no atomics; every sum has one order.
// Bytes moved: moments s an element of hidden, 8 more where values are kept; products 24 an element of the triangle.
// Split: moments: a block has 32 neurons and all tokens, each warp every eighth. products: a thread has one element.
#include "element.h"
#include "launchers.h"

namespace fedpft::cuda {
namespace {

constexpr int kLanes = 32, kWarps = 8;

template <class T>
__global__ void __launch_bounds__(kLanes* kWarps) moments(ActivationMoments p) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x;
  const auto* hidden = static_cast<const T*>(p.hidden);
  const auto* shares = static_cast<const Wide<T>*>(p.shares);
  double sum = 0.0, squares = 0.0;
  for (int64_t row = threadIdx.y; row < p.tokens && column < p.neurons; row += kWarps) {
    const int64_t at = row * p.neurons + column;
    double h = 0.0;
    if (p.mask == nullptr || p.mask[row * p.mask_stride]) {
      h = static_cast<double>(widen(hidden[at]));
      if (shares != nullptr) h *= static_cast<double>(shares[row * p.shares_stride]);
    }
    if (p.values != nullptr) p.values[at] = h;
    sum += h;
    squares += h * h;
  }
  __shared__ double partial[2][kWarps][kLanes];
  partial[0][threadIdx.y][threadIdx.x] = sum;
  partial[1][threadIdx.y][threadIdx.x] = squares;
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.neurons) return;
  for (int warp = 1; warp < kWarps; ++warp) {
    sum += partial[0][warp][threadIdx.x];
    squares += partial[1][warp][threadIdx.x];
  }
  p.total[column] += sum;
  if (p.squares != nullptr) p.squares[column] += squares;
}

__global__ void __launch_bounds__(kLanes* kWarps)
    products(const double* product, int64_t rows, int64_t columns, double* second, int64_t ld_second) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kWarps + threadIdx.y;
  if (row < rows && row <= column && column < columns) {
    second[row * ld_second + column] += product[row * columns + column];
  }
}

}  // namespace

extern "C" cudaError_t fedpft_activation_moments(const ActivationMoments* pass, cudaStream_t stream) {
  const dim3 grid(divide_up<int64_t>(pass->neurons, kLanes));
  return with_type(pass->element, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(moments<T>, grid, dim3(kLanes, kWarps), stream, *pass);
  });
}

extern "C" cudaError_t fedpft_activation_products(
    const double* product, int64_t rows, int64_t columns, double* second, int64_t ld_second, cudaStream_t stream) {
  const dim3 grid(divide_up<int64_t>(columns, kLanes), divide_up<int64_t>(rows, kWarps));
  return launch(products, grid, dim3(kLanes, kWarps), stream, product, rows, columns, second, ld_second);
}

}  // namespace fedpft::cuda
