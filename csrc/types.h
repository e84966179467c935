// Names of element types and activations, as kernels for any device take them. Includes no header: see
// vector_kernels.h.
#pragma once

namespace fedpft {

enum class Activation : int { kRelu, kGelu, kGeluTanh, kSilu, kQuickGelu };
enum class Element : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

}  // namespace fedpft
