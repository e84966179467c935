// fedpft._C: importing it registers the compiled kernels with the dispatcher; build_info() says what was built.
// This file includes no torch header: pybind11 and the stable ABI stay apart, so one binary serves many torch versions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/capability.h"

PYBIND11_MODULE(_C, module) {
  fedpft::vector_kernels();  // a wrong FEDPFT_CPU_CAPABILITY must fail here, not in the first operator
  module.def("build_info", [] {
    pybind11::dict info;
    info["version"] = FEDPFT_VERSION;
#ifdef FEDPFT_NVCC
    info["cuda"] = true;
    info["nvcc"] = FEDPFT_NVCC;
    info["cuda_architectures"] = pybind11::str(FEDPFT_CUDA_ARCHITECTURES).attr("split")();
    info["cutlass"] = pybind11::str(FEDPFT_CUTLASS).attr("split")();
#endif
    info["capabilities"] = fedpft::compiled_capabilities();
    info["capability"] = fedpft::vector_kernels().name;
    info["compiler"] = FEDPFT_COMPILER;
    info["torch_target"] = FEDPFT_TORCH_TARGET;
    info["schemas"] = FEDPFT_SCHEMAS;
    return info;
  });
}
