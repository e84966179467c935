// Which instruction set's row loops run on this machine.
#pragma once

#include <string>
#include <vector>

#include "vector_kernels.h"

namespace fedpft {

// Names of the instruction sets compiled into this library, best last.
std::vector<std::string> compiled_capabilities();

// The best of them that this machine has, or the one named by the environment variable FEDPFT_CPU_CAPABILITY.
// Chosen on the first call; throws std::runtime_error if the named one is unknown or the machine lacks it.
const VectorKernels& vector_kernels();

}  // namespace fedpft
