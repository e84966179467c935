// ffn_gemm.h on Ampere and Ada: CUTLASS 2, compiled once per half type (FEDPFT_ELEMENT, the table FEDPFT_GEMMS).
//
// Multiply: A (N, D) and B (K, D), both row-major ("TN"): mma 16x8x16 with float32 accumulators; a block of 128
//   threads has a tile of 128 x 128, in 4 stages of 32 along D by cp.async: 64 KiB of shared memory, which 8.6 and
//   8.9 have too.
// Epilogue: the accumulators pass through shared memory, so that a thread holds 8 neighbouring columns of a row;
//   bias, kept values, gate and outputs are read and written from there, 16 bytes at once. Bytes moved: each element
//   once.
// Counts: bytes of one word a column group (a thread has at most 16 rows), added up over the lanes that share the
//   columns, then one atomic addition a warp and column. Sums of integers do not depend on their order.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "ffn_epilogue.cuh"
#include "ffn_gemm.h"

namespace fedpft::cuda {
namespace {

using Element = cutlass::FEDPFT_ELEMENT;
using RowMajor = cutlass::layout::RowMajor;
using BlockShape = cutlass::gemm::GemmShape<128, 128, 32>;
using WarpShape = cutlass::gemm::GemmShape<64, 64, 32>;
constexpr int V = 8;
using ThreadMap = cutlass::epilogue::threadblock::OutputTileThreadLayout<BlockShape, WarpShape, Element, V>;
using Outputs = cutlass::Array<Element, V>;

template <class Type>
CUTLASS_DEVICE Type load_at(const void* base, int64_t at) {
  static_assert(sizeof(Type) == 16);
  return base == nullptr ? Type{} : *reinterpret_cast<const Type*>(static_cast<const uint16_t*>(base) + at);
}

template <class Type>
CUTLASS_DEVICE void store_at(void* base, int64_t at, const Type& values) {
  static_assert(sizeof(Type) == 16);
  if (base != nullptr) *reinterpret_cast<Type*>(static_cast<uint16_t*>(base) + at) = values;
}

// The node that is a whole epilogue: `Body` visits V accumulators of row t, columns k to k + V - 1, if they exist.
template <class Body>
struct Epilogue {
  using Arguments = typename Body::Arguments;
  using Params = Arguments;
  struct SharedStorage {};

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }

  CUTLASS_HOST_DEVICE Epilogue() {}
  CUTLASS_HOST_DEVICE Epilogue(const Params& params, const SharedStorage&) : params(&params) {}

  const Params* params;

  template <class Coordinates>
  struct Callbacks : cutlass::epilogue::threadblock::detail::EmptyCallbacks {
    CUTLASS_DEVICE Callbacks(const Coordinates& coordinates, const Params& params)
        : coordinates(coordinates), body{params} {}

    Coordinates coordinates;
    Body body;

    CUTLASS_DEVICE auto visit(int iteration, int row, int column, int, const Values<V>& accumulators) {
      const auto at = coordinates(cute::_0{}, column, row, iteration);
      body.visit(cute::get<0>(at), cute::get<1>(at), column, accumulators);
      return accumulators;
    }

    CUTLASS_DEVICE void end_epilogue() {
      CUTLASS_PRAGMA_UNROLL
      for (int column = 0; column < ThreadMap::Iterations::kColumn; ++column) {
        body.end(cute::get<1>(coordinates(cute::_0{}, column, 0, 0)), column);
      }
    }
  };

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
    const auto coordinates =
        cute::group_modes<3, 6>(ThreadMap::partition(cute::make_identity_tensor(shape), thread, tile));
    return Callbacks<cute::remove_cvref_t<decltype(coordinates)>>(coordinates, *params);
  }
};

struct ForwardBody {
  using Arguments = ForwardGemm;
  static constexpr int kColumns = ThreadMap::Iterations::kColumn, kLanes = ThreadMap::Detail::kAccessWidth;
  // A byte holds the count of a thread's rows, and of those of the lanes that share its columns.
  static_assert(128 * 128 / 128 / V * (32 / kLanes) < 256 && 32 % kLanes == 0 && ThreadMap::kThreads == 128);

  const ForwardGemm& g;
  uint64_t inactive[kColumns] = {};

  CUTLASS_DEVICE explicit ForwardBody(const ForwardGemm& g) : g(g) {}

  CUTLASS_DEVICE void visit(int t, int k, int column, const Values<V>& accumulators) {
    if (t >= g.N || k >= g.K) return;
    const typename ForwardEpilogue<Element>::Arguments arguments{
        g.activation, g.eps, g.linear, g.compact, g.gate != nullptr, g.saved_first != nullptr, g.counts != nullptr};
    const auto result = ForwardEpilogue<Element>::template apply<V>(
        arguments, accumulators, load_at<Outputs>(g.bias, k), load_at<Words<V>>(g.gate, t * g.ld_gate + k));
    store_at(g.hidden, t * g.ld_hidden + k, result.hidden);
    store_at(g.saved_first, t * g.ld_saved + k, result.saved_first);
    store_at(g.saved_second, t * g.ld_saved + k, result.saved_second);
    if (g.counts == nullptr || (g.mask != nullptr && !g.mask[t])) return;
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < V; ++v) inactive[column] += static_cast<uint64_t>(result.inactive >> v & 1u) << (8 * v);
  }

  CUTLASS_DEVICE void end(int k, int column) {
    if (g.counts == nullptr) return;
    CUTLASS_PRAGMA_UNROLL
    for (int lanes = kLanes; lanes < 32; lanes *= 2) {
      inactive[column] += __shfl_xor_sync(0xffffffffu, inactive[column], lanes);
    }
    if (k >= g.K) return;
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < V; ++v) {  // the lanes that share the columns take turns
      const unsigned long long count = inactive[column] >> (8 * v) & 0xffu;
      if (v % (32 / kLanes) == threadIdx.x % 32 / kLanes && count != 0) {
        atomicAdd(reinterpret_cast<unsigned long long*>(g.counts) + k + v, count);
      }
    }
  }
};

struct BackwardBody {
  using Arguments = BackwardGemm;

  const BackwardGemm& g;

  CUTLASS_DEVICE explicit BackwardBody(const BackwardGemm& g) : g(g) {}

  CUTLASS_DEVICE void visit(int t, int k, int, const Values<V>& accumulators) {
    if (t >= g.N || k >= g.K) return;
    const typename BackwardEpilogue<Element>::Arguments arguments{g.activation, g.compact, g.saved_second != nullptr};
    const int64_t at = static_cast<int64_t>(t) * g.K + k, at_saved = t * g.ld_saved + k;
    const auto result = BackwardEpilogue<Element>::template apply<V>(
        arguments, accumulators, load_at<Words<V>>(g.saved_first, at_saved),
        load_at<Words<V>>(g.saved_second, at_saved));
    store_at(g.grad_first, at, result.grad_first);
    store_at(g.grad_second, at, result.grad_second);
  }

  CUTLASS_DEVICE void end(int, int) {}
};

template <class Body>
struct Multiply {
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
      Element, RowMajor, cutlass::ComplexTransform::kNone, 8, Element, cutlass::layout::ColumnMajor,
      cutlass::ComplexTransform::kNone, 8, Element, RowMajor, V, float, float, cutlass::arch::OpClassTensorOp,
      cutlass::arch::Sm80, BlockShape, WarpShape, cutlass::gemm::GemmShape<16, 8, 16>, Epilogue<Body>,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, 4, cutlass::arch::OpMultiplyAdd>::GemmKernel;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static const char* run(
      int N, int K, int D, const void* a, int64_t ld_a, const void* b, int64_t ld_b,
      const typename Body::Arguments& body, cudaStream_t stream) {
    const typename Gemm::Arguments arguments(
        cutlass::gemm::GemmUniversalMode::kGemm, {N, K, D}, 1, body, a, b, nullptr, nullptr, 0, 0, 0, 0, ld_a, ld_b, 0,
        0);
    if (Gemm::get_workspace_size(arguments) != 0) return "the multiply asks for a workspace";
    cutlass::Status status = Gemm::can_implement(arguments);
    Gemm gemm;
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
  }
};

const char* forward(const ForwardGemm& g, cudaStream_t stream) {
  return Multiply<ForwardBody>::run(g.N, g.K, g.D, g.x, g.ld_x, g.w, g.ld_w, g, stream);
}

const char* backward(const BackwardGemm& g, cudaStream_t stream) {
  return Multiply<BackwardBody>::run(g.N, g.K, g.D, g.grad_y, g.ld_grad_y, g.w_out, g.ld_w_out, g, stream);
}

}  // namespace

const FfnGemms FEDPFT_GEMMS = {forward, backward};

}  // namespace fedpft::cuda
