// Values as tensors store them: each type widens to the one that is computed in, and narrows back with one rounding.
//
// For sources that are compiled once per instruction set. Everything stands in an unnamed namespace, so that each of
// them has its own copy; the reason stands in vector_kernels.h.
#pragma once

namespace fedpft {
namespace {

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline double magnitude(double x) { return __builtin_fabs(x); }
inline float magnitude(float x) { return __builtin_fabsf(x); }

struct Float32 {
  using Stored = float;
  using Wide = float;
  static inline float load(float x) { return x; }
  static inline float store(float x) { return x; }
};

struct Float64 {
  using Stored = double;
  using Wide = double;
  static inline double load(double x) { return x; }
  static inline double store(double x) { return x; }
};

struct BFloat16 {
  using Stored = unsigned short;
  using Wide = float;
  static inline float load(unsigned short x) { return bits<float>(static_cast<unsigned>(x) << 16); }
  static inline unsigned short store(float x) {
    const unsigned word = bits<unsigned>(x);
    const unsigned rounded = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16;
    return static_cast<unsigned short>(x != x ? 0x7FC0u : rounded);
  }
};

struct Float16 {
  using Stored = unsigned short;
  using Wide = float;
  // Exponent and fraction move to their place in a float32, 2^112 mends the bias (and subnormals); 31 means inf or NaN.
  static inline float load(unsigned short x) {
    const unsigned word = (static_cast<unsigned>(x) & 0x7FFFu) << 13;
    const unsigned sign = (static_cast<unsigned>(x) & 0x8000u) << 16;
    const unsigned finite = bits<unsigned>(bits<float>(word) * 5.192296858534828e33f);
    return bits<float>((word >= 0x0F800000u ? word | 0x7F800000u : finite) | sign);
  }
  // Adding a power of two that is 2^13 times the value's own (or the least subnormal's) leaves the bits that a float16
  // keeps, rounded to nearest even, in the low end of the fraction. The two scalings before it carry what is too large
  // to infinity.
  static inline unsigned short store(float x) {
    const unsigned word = bits<unsigned>(x), sign = word >> 31 << 15, twice = word << 1;
    const float scaled = (magnitude(x) * 5.192296858534828e33f) * 7.703719777548943e-34f;  // 2^112, 2^-110
    const unsigned exponent = twice & 0xFF000000u;
    const unsigned at_least = exponent < 0x71000000u ? 0x71000000u : exponent;
    const unsigned sum = bits<unsigned>(bits<float>((at_least >> 1) + 0x07800000u) + scaled);
    const unsigned rounded = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
    return static_cast<unsigned short>(sign | (twice > 0xFF000000u ? 0x7E00u : rounded));
  }
};

}  // namespace
}  // namespace fedpft
