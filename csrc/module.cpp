// fedpft._C: importing it registers the compiled kernels with the dispatcher; build_info() says what was built.
// This file includes no torch header: pybind11 and the stable ABI stay apart, so one binary serves many torch versions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/capability.h"

namespace {

[[maybe_unused]] std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  fedpft::vector_kernels();  // a wrong FEDPFT_CPU_CAPABILITY must fail here, not in the first operator
  module.def("build_info", [] {
    pybind11::dict info;
    info["version"] = FEDPFT_VERSION;
#ifdef FEDPFT_NVCC
    info["cuda"] = true;
    info["nvcc"] = FEDPFT_NVCC;
    info["cuda_architectures"] = words(FEDPFT_CUDA_ARCHITECTURES);
    info["cutlass"] = words(FEDPFT_CUTLASS);
#endif
    info["capabilities"] = fedpft::compiled_capabilities();
    info["capability"] = fedpft::vector_kernels().name;
    info["compiler"] = FEDPFT_COMPILER;
    info["torch_target"] = FEDPFT_TORCH_TARGET;
    info["schemas"] = FEDPFT_SCHEMAS;
    return info;
  });
}
