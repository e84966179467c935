// mask_update: a silo's change as whole numbers, with masks on it.
//
//   word_i = floor(clamp(after_i - before_i, -bound, bound) * scale + (streams_0i mod 2^24) / 2^24)
//            + sum_{1 <= m <= added} streams_mi - sum_{m > added} streams_mi     mod 2^32
//
// Shapes: words (n,) int32, written; odd (2,) int32, added to: changes beyond the bound, and not finite, which count as
// 0; before, after (n,) float32; streams (M, n) int32, M at least 1. bound * scale is below 2^31 - 1.
// Arithmetic: float64, each operation rounded by itself (CMakeLists.txt: -ffp-contract=off), as the reference does.
// Determinism: every instruction set gives the same bits; no sum of floating-point numbers.
// Bytes moved: before, after and each stream are read once, words written once.
// Serial: where it is used, the cipher that makes the streams takes far longer.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "operands.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 1 << 11;

void mask_update_cpu(
    Tensor words, Tensor odd, Tensor before, Tensor after, Tensor streams, int64_t added, double scale, double bound) {
  if (words.dim() != 1 || streams.dim() != 2) fedpft::fail("words must have one dimension, streams two");
  const int64_t n = words.size(0), masks = streams.size(0);
  if (masks < 1 || added < 0 || added >= masks) fedpft::fail("added must be from 0 to the number of masks");
  fedpft::check(words, "words", ScalarType::Int, {n});
  fedpft::check(odd, "odd", ScalarType::Int, {2});
  fedpft::check(before, "before", ScalarType::Float, {n});
  fedpft::check(after, "after", ScalarType::Float, {n});
  fedpft::check(streams, "streams", ScalarType::Int, {masks, n});
  if (!words.is_contiguous() || !odd.is_contiguous()) fedpft::fail("words and odd must be contiguous");
  if (!(bound * scale < 2147483647.0)) fedpft::fail("bound * scale must be below 2^31 - 1");
  const Tensor first = fedpft::packed(before), last = fedpft::packed(after), rows = fedpft::packed_rows(streams);
  const float* from = static_cast<const float*>(first.const_data_ptr());
  const float* to = static_cast<const float*>(last.const_data_ptr());
  const int32_t* stream = static_cast<const int32_t*>(rows.const_data_ptr());
  const int64_t stride = masks > 1 ? rows.stride(0) : 0;
  // Unsigned: what wraps is defined then.
  uint32_t* out = static_cast<uint32_t*>(words.mutable_data_ptr());
  int32_t* count = static_cast<int32_t*>(odd.mutable_data_ptr());

  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(start + kBlock, n);
    int32_t beyond = 0, endless = 0;
    for (int64_t i = start; i < end; ++i) {
      const double change = static_cast<double>(to[i]) - static_cast<double>(from[i]);
      const bool finite = std::fabs(change) < HUGE_VAL;
      endless += !finite;
      beyond += finite && std::fabs(change) > bound;
      const double kept = finite ? std::min(std::max(change, -bound), bound) : 0.0;
      const double sum = kept * scale + (stream[i] & 0xFFFFFF) * 0x1p-24;
      const int32_t whole = static_cast<int32_t>(sum);
      out[i] = static_cast<uint32_t>(whole) - (static_cast<double>(whole) > sum);
    }
    count[0] += beyond;
    count[1] += endless;
    for (int64_t m = 1; m < masks; ++m) {
      const int32_t* mask = stream + m * stride;
      const uint32_t sign = m <= added ? 1u : ~0u;  // ~0 is -1 modulo 2^32
      for (int64_t i = start; i < end; ++i) out[i] += sign * static_cast<uint32_t>(mask[i]);
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fedpft, CPU, m) { m.impl("mask_update", TORCH_BOX(&mask_update_cpu)); }
