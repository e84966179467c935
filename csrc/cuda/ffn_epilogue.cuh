// What the epilogues of ffn_gemm.h compute on V neighbouring values of a row, whichever multiply they belong to.
#pragma once

#include <cutlass/array.h>
#include <cutlass/functional.h>
#include <cutlass/numeric_conversion.h>

#include "activation.cuh"

namespace fedpft::cuda {

template <int V>
using Values = cutlass::Array<float, V>;
template <int V>
using Words = cutlass::Array<uint16_t, V>;  // `saved`: the operator's half type or, compact, bfloat16

// Epilogues compute two values at a time and pack them at once: all V of every intermediate would not fit in registers
// beside the accumulators.
using Pair = cutlass::Array<float, 2>;

template <class Type, class Packed>
CUTLASS_DEVICE void pack(Packed& packed, int pair, const Pair& values) {
  reinterpret_cast<cutlass::Array<Type, 2>*>(&packed)[pair] = cutlass::NumericArrayConverter<Type, float, 2>{}(values);
}

template <class Type, class Packed>
CUTLASS_DEVICE Pair unpack(const Packed& packed, int pair) {
  return cutlass::NumericArrayConverter<float, Type, 2>{}(
      reinterpret_cast<const cutlass::Array<Type, 2>*>(&packed)[pair]);
}

template <class Element>
struct ForwardEpilogue {
  struct Arguments {
    Activation activation;
    float eps;
    bool linear, compact, gated, save, count;
  };

  template <int V>
  struct Result {
    cutlass::Array<Element, V> hidden;
    Words<V> saved_first, saved_second;
    uint32_t inactive;  // bit v: value v is
  };

  template <int V>
  struct Body {
    static_assert(V % 2 == 0 && V <= 32);
    const Arguments& arguments;
    const Values<V>& accumulators;
    const cutlass::Array<Element, V>& bias;
    const Words<V>& gate;
    Result<V>& result;

    template <Activation A>
    CUTLASS_DEVICE void run() const {
      const bool derive = arguments.save && arguments.compact;
      CUTLASS_PRAGMA_UNROLL
      for (int pair = 0; pair < V / 2; ++pair) {
        const Pair offset = unpack<Element>(bias, pair);
        const Pair z{accumulators[2 * pair] + offset[0], accumulators[2 * pair + 1] + offset[1]};
        const Pair activated_value = arguments.gated ? unpack<Element>(gate, pair) : z;
        Pair factor{1.0f, 1.0f}, hidden, active, derivative;
        if (arguments.gated) factor = z;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (derive) {
            const Activated<float> act = activated<A>(activated_value[i]);
            active[i] = act.value;
            derivative[i] = act.derivative * factor[i];
          } else {
            active[i] = value<A>(activated_value[i]);
          }
          hidden[i] = arguments.linear ? z[i] : active[i] * factor[i];
          result.inactive |= (fabsf(active[i]) <= arguments.eps ? 1u : 0u) << (2 * pair + i);
        }
        pack<Element>(result.hidden, pair, hidden);
        if (derive) {
          pack<cutlass::bfloat16_t>(result.saved_first, pair, derivative);
          pack<cutlass::bfloat16_t>(result.saved_second, pair, active);
        } else if (arguments.save) {
          pack<Element>(result.saved_first, pair, z);
        }
      }
    }
  };

  template <int V>
  CUTLASS_DEVICE static Result<V> apply(
      const Arguments& arguments, const Values<V>& accumulators, const cutlass::Array<Element, V>& bias,
      const Words<V>& gate) {
    Result<V> result;
    result.inactive = 0;
    with_activation(arguments.activation, Body<V>{arguments, accumulators, bias, gate, result});
    return result;
  }
};

template <class Element>
struct BackwardEpilogue {
  struct Arguments {
    Activation activation;
    bool compact, gated;
  };

  template <int V>
  struct Result {
    cutlass::Array<Element, V> grad_first, grad_second;
  };

  template <int V>
  struct Body {
    static_assert(V % 2 == 0);
    const Arguments& arguments;
    const Values<V>& grad_hidden;
    const Words<V>&saved_first, &saved_second;
    Result<V>& result;

    template <Activation A>
    CUTLASS_DEVICE void run() const {
      CUTLASS_PRAGMA_UNROLL
      for (int pair = 0; pair < V / 2; ++pair) {
        const Pair first = unpack<Element>(saved_first, pair);
        Pair grad_first, grad_second, factor{1.0f, 1.0f};
        if (arguments.gated) factor = unpack<Element>(saved_second, pair);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float grad = grad_hidden[2 * pair + i];
          const Activated<float> act = activated<A>(first[i]);
          grad_first[i] = grad * act.derivative * factor[i];
          grad_second[i] = grad * act.value;
        }
        pack<Element>(result.grad_first, pair, grad_first);
        pack<Element>(result.grad_second, pair, grad_second);
      }
    }
  };

  template <int V>
  CUTLASS_DEVICE static Result<V> apply(
      const Arguments& arguments, const Values<V>& grad_hidden, const Words<V>& saved_first,
      const Words<V>& saved_second) {
    Result<V> result;
    if (!arguments.compact) {
      with_activation(arguments.activation, Body<V>{arguments, grad_hidden, saved_first, saved_second, result});
      return result;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int pair = 0; pair < V / 2; ++pair) {
      const cutlass::multiplies<Pair> multiply;
      const Pair grad{grad_hidden[2 * pair], grad_hidden[2 * pair + 1]};
      pack<Element>(result.grad_first, pair, multiply(grad, unpack<cutlass::bfloat16_t>(saved_first, pair)));
      pack<Element>(result.grad_second, pair, multiply(grad, unpack<cutlass::bfloat16_t>(saved_second, pair)));
    }
    return result;
  }
};

}  // namespace fedpft::cuda
