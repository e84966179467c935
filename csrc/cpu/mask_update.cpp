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

#include "operands.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 1 << 11;

// Short loops of one kind of operation each: so they become vector instructions.
void quantise(
    const float* __restrict__ from, const float* __restrict__ to, const int32_t* __restrict__ chance, int64_t size,
    double scale, double bound, uint32_t* __restrict__ out, int32_t* count) {
  double steps[kBlock], beyond = 0.0, endless = 0.0;  // the counts too, which are exact in any order
#pragma omp simd reduction(+ : beyond, endless)
  for (int64_t i = 0; i < size; ++i) {
    const double change = static_cast<double>(to[i]) - static_cast<double>(from[i]);
    const double nothing = change - change;  // not a number if the change is not finite
    endless += nothing != nothing ? 1.0 : 0.0;
    const double known = nothing != nothing ? 0.0 : change;
    const double low = known < -bound ? -bound : known, kept = low > bound ? bound : low;
    beyond += kept != known ? 1.0 : 0.0;
    steps[i] = kept * scale;
  }
  for (int64_t i = 0; i < size; ++i) steps[i] += (chance[i] & 0xFFFFFF) * 0x1p-24;
  for (int64_t i = 0; i < size; ++i) {
    const int32_t whole = static_cast<int32_t>(steps[i]);
    out[i] = static_cast<uint32_t>(whole) - (static_cast<double>(whole) > steps[i] ? 1u : 0u);
  }
  count[0] += static_cast<int32_t>(beyond);
  count[1] += static_cast<int32_t>(endless);
}

// sign: 1, or ~0, which is -1 modulo 2^32.
void add(const int32_t* __restrict__ mask, uint32_t sign, int64_t size, uint32_t* __restrict__ out) {
  for (int64_t i = 0; i < size; ++i) out[i] += sign * static_cast<uint32_t>(mask[i]);
}

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
    const int64_t size = std::min(kBlock, n - start);
    quantise(from + start, to + start, stream + start, size, scale, bound, out + start, count);
    for (int64_t m = 1; m < masks; ++m) add(stream + m * stride + start, m <= added ? 1u : ~0u, size, out + start);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fedpft, CPU, m) { m.impl("mask_update", TORCH_BOX(&mask_update_cpu)); }
