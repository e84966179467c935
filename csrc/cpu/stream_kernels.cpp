// Loops over whole tensors, compiled once per instruction set (CMakeLists.txt): FEDPFT_STREAMS is this copy's table.
//
// Determinism: a sum's order depends on the instruction set and the length, on nothing else.
#include "stream_kernels.h"

#include "elements.h"
#include "vector_kernels.h"

namespace fedpft {
namespace {

// Terms that are summed in Wide before they join a float64: rounding does not grow with the hidden size.
constexpr long kChunk = 64;
constexpr long kNeuronBlock = 256;

// Neuron j is a row: its values are next to each other.
template <class E>
void add_squares_of_rows(const typename E::Stored* w, long neurons, long hidden, long neuron_stride, double* energy) {
  for (long j = 0; j < neurons; ++j, w += neuron_stride) {
    double sum = 0.0;
    for (long first = 0; first < hidden; first += 8 * kChunk) {
      const long last = first + 8 * kChunk < hidden ? first + 8 * kChunk : hidden;
      typename E::Wide partial = 0;
#pragma omp simd reduction(+ : partial)
      for (long i = first; i < last; ++i) {
        const typename E::Wide x = E::load(w[i]);
        partial += x * x;
      }
      sum += partial;
    }
    energy[j] += sum;
  }
}

// Neuron j is a column, or neither: whole rows of a block of neurons are read in turn.
template <class E>
void add_squares_of_columns(
    const typename E::Stored* w, long neurons, long hidden, long neuron_stride, long hidden_stride, double* energy) {
  typename E::Wide partial[kNeuronBlock];
  for (long block = 0; block < neurons; block += kNeuronBlock) {
    const long width = neurons - block < kNeuronBlock ? neurons - block : kNeuronBlock;
    for (long first = 0; first < hidden; first += kChunk) {
      const long last = first + kChunk < hidden ? first + kChunk : hidden;
      for (long j = 0; j < width; ++j) partial[j] = 0;
      for (long i = first; i < last; ++i) {
        const typename E::Stored* row = w + block * neuron_stride + i * hidden_stride;
        if (neuron_stride == 1) {
#pragma omp simd
          for (long j = 0; j < width; ++j) {
            const typename E::Wide x = E::load(row[j]);
            partial[j] += x * x;
          }
        } else {
          for (long j = 0; j < width; ++j) {
            const typename E::Wide x = E::load(row[j * neuron_stride]);
            partial[j] += x * x;
          }
        }
      }
      for (long j = 0; j < width; ++j) energy[block + j] += partial[j];
    }
  }
}

// Calls f with the element type as a compile-time constant.
template <class F>
inline auto with_element(Element element, F f) {
  switch (element) {
    case Element::kFloat32:
      return f.template run<Float32>();
    case Element::kFloat64:
      return f.template run<Float64>();
    case Element::kFloat16:
      return f.template run<Float16>();
    default:
      return f.template run<BFloat16>();
  }
}

template <class E>
const typename E::Stored* stored(const void* values) {
  return static_cast<const typename E::Stored*>(values);
}

struct AddSquares {
  const void* w;
  long neurons, hidden, neuron_stride, hidden_stride;
  double* energy;
  template <class E>
  void run() const {
    if (hidden_stride == 1) return add_squares_of_rows<E>(stored<E>(w), neurons, hidden, neuron_stride, energy);
    add_squares_of_columns<E>(stored<E>(w), neurons, hidden, neuron_stride, hidden_stride, energy);
  }
};

struct Widen {
  const void* half;
  float* out;
  long n;
  template <class E>
  void run() const {
    const typename E::Stored* values = stored<E>(half);
#pragma omp simd
    for (long i = 0; i < n; ++i) out[i] = static_cast<float>(E::load(values[i]));
  }
};

struct AddErrors {
  const void *student, *teacher;
  long n;
  double *error, *energy;
  template <class E>
  void run() const {
    const typename E::Stored *s = stored<E>(student), *t = stored<E>(teacher);
    for (long first = 0; first < n; first += 8 * kChunk) {
      const long last = first + 8 * kChunk < n ? first + 8 * kChunk : n;
      typename E::Wide errors = 0, energies = 0;
#pragma omp simd reduction(+ : errors, energies)
      for (long i = first; i < last; ++i) {
        const typename E::Wide wanted = E::load(t[i]), difference = wanted - E::load(s[i]);
        errors += difference * difference;
        energies += wanted * wanted;
      }
      *error += errors;
      *energy += energies;
    }
  }
};

struct ErrorGradient {
  const void *student, *teacher;
  double factor;
  void* out;
  long n;
  template <class E>
  void run() const {
    const typename E::Stored *s = stored<E>(student), *t = stored<E>(teacher);
    typename E::Stored* gradient = static_cast<typename E::Stored*>(out);
    const auto scale = static_cast<typename E::Wide>(factor);
#pragma omp simd
    for (long i = 0; i < n; ++i) gradient[i] = E::store((E::load(s[i]) - E::load(t[i])) * scale);
  }
};

struct Quantize {
  const void* x;
  signed char* q;
  long n;
  template <class E>
  float run() const {
    const typename E::Stored* values = stored<E>(x);
    // Magnitudes are ordered as their bits are, infinity above all numbers and what is not a number above that.
    int largest = 0;
#pragma omp simd reduction(max : largest)
    for (long i = 0; i < n; ++i) {
      const int word = bits<int>(magnitude(static_cast<float>(E::load(values[i]))));
      largest = word > largest ? word : largest;
    }
    const float scale = bits<float>(largest) / 127.0f;
    if (scale >= 1.17549435e-38f && scale < __builtin_inff()) {  // then no quotient is beyond 127.5
#pragma omp simd
      for (long i = 0; i < n; ++i) q[i] = rounded(static_cast<float>(E::load(values[i])) / scale);
      return scale;
    }
    for (long i = 0; i < n; ++i) {
      const float steps = static_cast<float>(E::load(values[i])) / scale;
      q[i] = steps != steps ? 0 : steps > 127.0f ? 127 : steps < -127.0f ? -127 : rounded(steps);
    }
    return scale;
  }
  // Adding 1.5 * 2^23 rounds to nearest even and leaves the whole number in the low bits.
  static signed char rounded(float x) { return static_cast<signed char>(bits<int>(x + 12582912.0f)); }
};

void add_squares(
    Element element, const void* w, long neurons, long hidden, long neuron_stride, long hidden_stride, double* energy) {
  with_element(element, AddSquares{w, neurons, hidden, neuron_stride, hidden_stride, energy});
}

void widen(Element element, const void* half, float* out, long n) { with_element(element, Widen{half, out, n}); }

void add_errors(Element element, const void* student, const void* teacher, long n, double* error, double* energy) {
  with_element(element, AddErrors{student, teacher, n, error, energy});
}

void error_gradient(Element element, const void* student, const void* teacher, double factor, void* out, long n) {
  with_element(element, ErrorGradient{student, teacher, factor, out, n});
}

float quantize(Element element, const void* x, signed char* q, long n) {
  return with_element(element, Quantize{x, q, n});
}

void dequantize_add(const signed char* q, float scale, float weight, float* total, long n) {
#pragma omp simd
  for (long i = 0; i < n; ++i) total[i] += weight * (static_cast<float>(q[i]) * scale);
}

}  // namespace

extern const StreamKernels FEDPFT_STREAMS = {add_squares, widen, add_errors, error_gradient, quantize, dequantize_add};

}  // namespace fedpft
