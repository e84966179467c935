// ffn_gemm.h on Hopper: CUTLASS 3, compiled once per half type (FEDPFT_ELEMENT, the table FEDPFT_GEMMS).
//
// Multiply: A (N, D) and B (K, D), both row-major, so both operands are contiguous along D ("TN"): wgmma 64x128x16
//   with float32 accumulators, operands by TMA into as many stages as shared memory holds beside the epilogue.
// Grid: persistent; a block of 384 threads is one warpgroup that loads and two that multiply ("pingpong"): while one
//   runs the epilogue of its 128x128 tile, the other multiplies. At D = 768 the activation costs about as much as the
//   multiply, so hiding one behind the other is what pays. Two blocks of a cluster share a tile of B (weights).
// Epilogue: `saved` and the output leave through shared memory and TMA stores; bias, activation, derivative and count
//   work on the accumulators in registers. Bytes moved: the operands once a wave, and each output element once.
// Counts: one atomic addition per warp and column of a tile. Sums of integers do not depend on their order, so counts
//   and everything else have the same bits on every run.
// One instance a direction: which tensors exist and which activation runs are arguments, uniform over the grid.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "ffn_epilogue.cuh"
#include "ffn_gemm.h"

namespace fedpft::cuda {
namespace {

namespace fusion = cutlass::epilogue::fusion;
using Element = cutlass::FEDPFT_ELEMENT;
using RowMajor = cutlass::layout::RowMajor;
using TileShape = cute::Shape<cute::_128, cute::_128, cute::_64>;
using ClusterShape = cute::Shape<cute::_2, cute::_1, cute::_1>;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
using Descriptor = cutlass::epilogue::collective::detail::EpilogueDescriptor<
    TileShape, cutlass::epilogue::collective::EpilogueTileAuto, void, Element, EpilogueSchedule>;
using LoadDescriptor = cutlass::epilogue::collective::detail::AuxLoadDescriptor<Descriptor, RowMajor, uint16_t>;
using Stride = typename LoadDescriptor::Stride;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

using Bias = fusion::Sm90RowBroadcast<0, TileShape, Element, Element>;

template <class Type, class D = cutlass::epilogue::collective::detail::AuxStoreDescriptor<Descriptor, RowMajor, Type>>
using Store = fusion::Sm90AuxStore<
    D::Stages, typename D::EpilogueTile, Type, kRound, typename D::Stride, typename D::SmemLayoutAtom,
    typename D::CopyOpR2S>;

// CUTLASS makes a TMA descriptor of an absent tensor too, and waits for its loads; here neither happens.
struct Load : fusion::Sm90AuxLoad<
                  LoadDescriptor::Stages, typename LoadDescriptor::EpilogueTile, uint16_t, Stride,
                  typename LoadDescriptor::SmemLayoutAtom, typename LoadDescriptor::CopyOpS2R> {
  using Base = fusion::Sm90AuxLoad<
      LoadDescriptor::Stages, typename LoadDescriptor::EpilogueTile, uint16_t, Stride,
      typename LoadDescriptor::SmemLayoutAtom, typename LoadDescriptor::CopyOpS2R>;
  using Base::Base;

  template <class ProblemShape>
  static Params to_underlying_arguments(const ProblemShape& shape, const Arguments& arguments, void* workspace) {
    Params params;
    params.use_default = true;
    return arguments.ptr_aux ? Base::to_underlying_arguments(shape, arguments, workspace) : params;
  }
  CUTLASS_DEVICE bool is_producer_load_needed() const { return !this->params_ptr->use_default; }
};

// Inactive values per column. A subtile of the epilogue (64 x 32) gives a thread 16 values as wgmma lays them out: rows
// r and r + 8 of its warp's 16, and in each the columns c, c + 1, c + 8, c + 9, ..., c + 25, where c = 2 (lane % 4) and
// r = lane / 4. So 8 lanes share a thread's 8 columns: 8 counts of at most 4 rows a thread and 32 a warp, as bytes of
// two words. After the tile's last rows the warp adds them up, and every lane adds one column to the total. CUTLASS's
// own column reduction keeps 32 counts a thread and spilled; it also has the driver's memset zero the total, while this
// library must load without a driver: here the caller zeroes it.
struct Count : fusion::Sm90VisitorImpl<> {
  struct SharedStorage {};
  struct Arguments {
    int64_t* counts;
    const bool* mask;
  };
  using Params = Arguments;

  static_assert(cute::is_same_v<typename Descriptor::EpilogueTile, cute::Shape<cute::_64, cute::_32>>);
  static constexpr int kValues = 16, kRows = 4;  // of a thread: in a subtile; in a tile of 128 rows

  template <class ProblemShape>
  static Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(
      const ProblemShape&, const Arguments&, void*, cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE Count() {}
  CUTLASS_HOST_DEVICE Count(const Params& params, const SharedStorage&) : params(params) {}

  Params params;

  struct Callbacks : fusion::EmptyConsumerStoreCallbacks {
    Params params;
    int first_row, first_column, N, K;
    uint32_t counted = 0, low = 0,
             high = 0;  // bit of a row; bytes of columns c, c + 1, c + 8, c + 9 and the other four

    CUTLASS_DEVICE Callbacks(const Params& params, int first_row, int first_column, int N, int K)
        : params(params), first_row(first_row), first_column(first_column), N(N), K(K) {}

    CUTLASS_DEVICE void begin() {
      if (params.counts == nullptr) return;
      CUTLASS_PRAGMA_UNROLL
      for (int slot = 0; slot < kRows; ++slot) {
        const int row = first_row + slot / 2 * 64 + slot % 2 * 8;
        if (row < N && (params.mask == nullptr || params.mask[row])) counted |= 1u << slot;
      }
    }

    // Value v of a fragment: bit 0 is its column's parity, bit 1 its row, bits 2 and 3 its group of 8 columns.
    CUTLASS_DEVICE void add(uint32_t inactive, int epi_m) {
      CUTLASS_PRAGMA_UNROLL
      for (int v = 0; v < kValues; ++v) {
        const uint32_t is_inactive = inactive >> v & counted >> (2 * epi_m + (v >> 1 & 1)) & 1u;
        const int column = (v >> 2) * 2 + (v & 1);
        (column < 4 ? low : high) += is_inactive << (8 * (column % 4));
      }
    }

    template <class STensor, class SyncFn, class VTensor>
    CUTLASS_DEVICE void reduce(STensor&&, const SyncFn&, int epi_m, int epi_n, bool, VTensor) {
      if (params.counts == nullptr || epi_m != 1) return;
      CUTLASS_PRAGMA_UNROLL
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        low += __shfl_xor_sync(0xffffffffu, low, lanes);
        high += __shfl_xor_sync(0xffffffffu, high, lanes);
      }
      const int column = threadIdx.x % 32 / 4;
      const int k = first_column + epi_n * 32 + column / 2 * 8 + column % 2;
      const int count = (column < 4 ? low : high) >> (8 * (column % 4)) & 0xffu;
      if (k < K && count != 0) {
        atomicAdd(reinterpret_cast<unsigned long long*>(params.counts) + k, static_cast<unsigned long long>(count));
      }
      low = high = 0;
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    const auto [N, K, D, L] = args.problem_shape_mnkl;
    return Callbacks(params, N - cute::get<0>(args.residue_tCcD), K - cute::get<1>(args.residue_tCcD), N, K);
  }
};

// A node that only carries an epilogue's arguments to the device.
template <class Epilogue>
struct Carrier {
  template <class>
  struct Function {
    using Arguments = typename Epilogue::Arguments;
  };
  using Node = fusion::Sm90Compute<Function, Element, float, kRound>;
};

// One visit of V accumulators of a row: loads come first, `Visit` computes, stores and count follow.
template <class Visit, class... Nodes>
struct Epilogue : fusion::Sm90VisitorImpl<Nodes...> {
  using Base = fusion::Sm90VisitorImpl<Nodes...>;
  using Base::Base;

  template <class Impl>
  struct ConsumerStoreCallbacks : Impl {
    CUTLASS_DEVICE explicit ConsumerStoreCallbacks(Impl&& impl) : Impl(cute::move(impl)) {}

    template <class Accumulator, int V>
    CUTLASS_DEVICE cutlass::Array<Element, V> visit(
        const cutlass::Array<Accumulator, V>& accumulators, int epi_v, int epi_m, int epi_n) {
      return Visit::visit(this->callbacks_tuple, accumulators, epi_v, epi_m, epi_n);
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    auto callbacks = Base::template get_consumer_store_callbacks<ReferenceSrc>(args);
    return ConsumerStoreCallbacks<decltype(callbacks)>(cute::move(callbacks));
  }
};

struct ForwardVisit {
  enum { kArguments, kBias, kGate, kFirst, kSecond, kCount };

  template <class Callbacks, int V>
  CUTLASS_DEVICE static cutlass::Array<Element, V> visit(
      Callbacks& nodes, const Values<V>& accumulators, int epi_v, int epi_m, int epi_n) {
    using cute::get;
    const auto& arguments = get<kArguments>(nodes).params;
    const cutlass::Array<Element, V> bias = get<kBias>(nodes).visit(accumulators, epi_v, epi_m, epi_n);
    const Words<V> gate = get<kGate>(nodes).visit(accumulators, epi_v, epi_m, epi_n);
    const auto result = ForwardEpilogue<Element>::template apply<V>(arguments, accumulators, bias, gate);
    if (arguments.save) {
      get<kFirst>(nodes).visit(accumulators, epi_v, epi_m, epi_n, result.saved_first);
      get<kSecond>(nodes).visit(accumulators, epi_v, epi_m, epi_n, result.saved_second);
    }
    static_assert(V == Count::kValues);
    if (arguments.count) get<kCount>(nodes).add(result.inactive, epi_m);
    return result.hidden;
  }
};

struct BackwardVisit {
  enum { kArguments, kFirst, kSecond, kGradSecond };

  template <class Callbacks, int V>
  CUTLASS_DEVICE static cutlass::Array<Element, V> visit(
      Callbacks& nodes, const Values<V>& accumulators, int epi_v, int epi_m, int epi_n) {
    using cute::get;
    const Words<V> first = get<kFirst>(nodes).visit(accumulators, epi_v, epi_m, epi_n);
    const Words<V> second = get<kSecond>(nodes).visit(accumulators, epi_v, epi_m, epi_n);
    const auto result =
        BackwardEpilogue<Element>::template apply<V>(get<kArguments>(nodes).params, accumulators, first, second);
    get<kGradSecond>(nodes).visit(accumulators, epi_v, epi_m, epi_n, result.grad_second);
    return result.grad_first;
  }
};

template <class Callbacks>
struct Multiply {
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, 8, Element, RowMajor, 8,
      EpilogueSchedule, Callbacks>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, 8, Element, cutlass::layout::ColumnMajor,
      8, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<
      cute::Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue, cutlass::gemm::PersistentScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static const char* run(
      int N, int K, int D, const void* a, int64_t ld_a, const void* b, int64_t ld_b, void* out, int64_t ld_out,
      const typename Callbacks::Arguments& callbacks, cudaStream_t stream) {
    typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm, {N, K, D, 1}};
    arguments.mainloop.ptr_A = static_cast<const Element*>(a);
    arguments.mainloop.dA = {ld_a, cute::_1{}, int64_t{0}};
    arguments.mainloop.ptr_B = static_cast<const Element*>(b);
    arguments.mainloop.dB = {ld_b, cute::_1{}, int64_t{0}};
    arguments.epilogue.thread = callbacks;
    arguments.epilogue.ptr_C = nullptr;
    arguments.epilogue.ptr_D = static_cast<Element*>(out);
    arguments.epilogue.dD = {ld_out, cute::_1{}, int64_t{0}};
    // The TMA descriptors come from the driver, which wants a current context. A thread that has not used the GPU yet,
    // such as that of torch's backward, has none: setting the device makes it current.
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) return "no current device";
    arguments.hw_info.device_id = device;
    arguments.hw_info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(device);
    if (Gemm::get_workspace_size(arguments) != 0) return "the multiply asks for a workspace";
    cutlass::Status status = Gemm::can_implement(arguments);
    Gemm gemm;
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
  }
};

using Forward = Multiply<Epilogue<
    ForwardVisit, Carrier<ForwardEpilogue<Element>>::Node, Bias, Load, Store<uint16_t>, Store<uint16_t>, Count>>;
using Backward =
    Multiply<Epilogue<BackwardVisit, Carrier<BackwardEpilogue<Element>>::Node, Load, Load, Store<Element>>>;

Stride row_stride(int64_t ld) { return {ld, cute::_1{}, int64_t{0}}; }

const char* forward(const ForwardGemm& g, cudaStream_t stream) {
  const bool save = g.saved_first != nullptr;
  const ForwardEpilogue<Element>::Arguments arguments{g.activation,      g.eps, g.linear,           g.compact,
                                                      g.gate != nullptr, save,  g.counts != nullptr};
  return Forward::run(
      g.N, g.K, g.D, g.x, g.ld_x, g.w, g.ld_w, g.hidden, g.ld_hidden,
      {arguments,
       {static_cast<const Element*>(g.bias)},
       {static_cast<const uint16_t*>(g.gate), uint16_t{0}, row_stride(g.ld_gate)},
       {static_cast<uint16_t*>(g.saved_first), row_stride(g.ld_saved)},
       {static_cast<uint16_t*>(g.saved_second), row_stride(g.ld_saved)},
       {g.counts, g.mask}},
      stream);
}

const char* backward(const BackwardGemm& g, cudaStream_t stream) {
  const BackwardEpilogue<Element>::Arguments arguments{g.activation, g.compact, g.saved_second != nullptr};
  return Backward::run(
      g.N, g.K, g.D, g.grad_y, g.ld_grad_y, g.w_out, g.ld_w_out, g.grad_first, g.K,
      {arguments,
       {static_cast<const uint16_t*>(g.saved_first), uint16_t{0}, row_stride(g.ld_saved)},
       {static_cast<const uint16_t*>(g.saved_second), uint16_t{0}, row_stride(g.ld_saved)},
       {static_cast<Element*>(g.grad_second), row_stride(g.K)}},
      stream);
}

}  // namespace

const FfnGemms FEDPFT_GEMMS = {forward, backward};

}  // namespace fedpft::cuda
