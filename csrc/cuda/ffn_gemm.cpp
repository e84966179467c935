#include "ffn_gemm.h"

namespace fedpft::cuda {

const FfnGemms* ffn_gemms(Element element) {
  int device = 0, major = 0;
  if (element != Element::kBFloat16 && element != Element::kFloat16) return nullptr;
  if (cudaGetDevice(&device) != cudaSuccess) return nullptr;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return nullptr;
#ifdef FEDPFT_SM90A
  if (major == 9) return element == Element::kBFloat16 ? &kSm90BFloat16 : &kSm90Float16;
#endif
#ifdef FEDPFT_SM80
  if (major == 8) return element == Element::kBFloat16 ? &kSm80BFloat16 : &kSm80Float16;
#endif
  return nullptr;
}

}  // namespace fedpft::cuda
