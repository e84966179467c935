// Matrices in memory that others own, and their products.
//
// A product may run in any thread of a call. Threads of torch's pool know neither the caller's inference mode nor its
// autograd state, so no tensor of the caller goes to them: each product wraps the bare memory anew.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fedpft {

template <class Real>
struct Matrix {
  Real* data = nullptr;
  int64_t rows = 0, columns = 0, row_stride = 0, column_stride = 0;

  Matrix() = default;
  Matrix(Real* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride = 1)
      : data(data), rows(rows), columns(columns), row_stride(row_stride), column_stride(column_stride) {}
  explicit Matrix(const torch::stable::Tensor& t)
      : Matrix(static_cast<Real*>(t.mutable_data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1)) {}

  Real* row(int64_t i) const { return data + i * row_stride; }
  Matrix slice(int64_t first, int64_t count) const { return {row(first), count, columns, row_stride, column_stride}; }
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }

  torch::stable::Tensor tensor() const {
    using torch::headeronly::ScalarType;
    constexpr ScalarType type = sizeof(Real) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
    const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
    return torch::stable::from_blob(data, {sizes, 2}, {strides, 2}, torch::headeronly::DeviceType::CPU, type);
  }
};

// out = a b
template <class Real>
void multiply(const Matrix<Real>& out, const Matrix<Real>& a, const Matrix<Real>& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.tensor().get(), a.tensor().get(), b.tensor().get()));
}

// out = addend + a b; the addend is out itself, or one row for all.
template <class Real>
void multiply_add(const Matrix<Real>& out, const Matrix<Real>& addend, const Matrix<Real>& a, const Matrix<Real>& b) {
  const torch::stable::Tensor result = out.tensor();
  const torch::stable::Tensor sum = addend.data == out.data ? result : addend.tensor();
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(result.get(), sum.get(), a.tensor().get(), b.tensor().get(), 1.0, 1.0));
}

}  // namespace fedpft
