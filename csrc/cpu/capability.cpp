#include "capability.h"

#include <cstdlib>
#include <stdexcept>

namespace fedpft {
namespace {

struct Capability {
  const VectorKernels* kernels;
  bool runs_here;
};

std::vector<Capability> capabilities() {
  std::vector<Capability> all{{&kBaselineKernels, true}};
#ifdef FEDPFT_X86
  __builtin_cpu_init();
  all.push_back({&kAvx2Kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
  all.push_back(
      {&kAvx512Kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")});
#endif
  return all;
}

const VectorKernels& choose() {
  const char* wanted = std::getenv("FEDPFT_CPU_CAPABILITY");
  const VectorKernels* best = nullptr;
  for (const Capability& capability : capabilities()) {
    if (wanted == nullptr ? capability.runs_here : capability.kernels->name == std::string(wanted)) {
      if (!capability.runs_here) {
        throw std::runtime_error(std::string("FEDPFT_CPU_CAPABILITY=") + wanted + ": this machine does not have it");
      }
      best = capability.kernels;
    }
  }
  if (best == nullptr) {
    std::string known;
    for (const std::string& name : compiled_capabilities()) known += " " + name;
    throw std::runtime_error(std::string("FEDPFT_CPU_CAPABILITY=") + wanted + ": must be one of" + known);
  }
  return *best;
}

}  // namespace

std::vector<std::string> compiled_capabilities() {
  std::vector<std::string> names;
  for (const Capability& capability : capabilities()) names.emplace_back(capability.kernels->name);
  return names;
}

const VectorKernels& vector_kernels() {
  static const VectorKernels& chosen = choose();
  return chosen;
}

}  // namespace fedpft
