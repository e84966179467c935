# The CUDA half of fedpft._C. Nothing of torch's CUDA build is used, so any torch will do to build it.

find_program(NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(DEFINED ENV{CUDACXX})
  set(CMAKE_CUDA_COMPILER $ENV{CUDACXX})
elseif(NVCC)
  set(CMAKE_CUDA_COMPILER ${NVCC})
elseif(FEDPFT_CUDA STREQUAL "1")
  message(FATAL_ERROR "FEDPFT_CUDA=1, but nvcc was not found: install the CUDA toolkit, or set CUDA_HOME or CUDACXX")
else()
  message(STATUS "fedpft: nvcc was not found: without CUDA kernels")
  return()
endif()

# Which GPUs. Plain kernels are built as asked for; PTX lets newer GPUs run them. CUTLASS kernels use instructions of one
# architecture, so each of theirs is built if one of its GPUs was asked for, and the host chooses by the GPU it finds.
set(architectures "")
set(cutlass_architectures "")
string(REGEX REPLACE "[ ,]+" ";" capabilities "${TORCH_CUDA_ARCH_LIST}")
if(NOT capabilities)
  set(capabilities 8.0 9.0+PTX)
endif()
foreach(capability IN LISTS capabilities)
  if(NOT capability MATCHES "^([0-9]+)\\.([0-9])[af]?(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: ${capability} must look like 8.0, 9.0a or 9.0+PTX")
  endif()
  list(APPEND architectures ${CMAKE_MATCH_1}${CMAKE_MATCH_2}-real)
  if(CMAKE_MATCH_3)
    list(APPEND architectures ${CMAKE_MATCH_1}${CMAKE_MATCH_2}-virtual)
  endif()
  if(CMAKE_MATCH_1 EQUAL 8)
    list(APPEND cutlass_architectures sm_80)
  elseif(CMAKE_MATCH_1 EQUAL 9)
    list(APPEND cutlass_architectures sm_90a)
  endif()
endforeach()
list(REMOVE_DUPLICATES architectures)
list(REMOVE_DUPLICATES cutlass_architectures)

if(NOT CUTLASS_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "from importlib.util import find_spec as f; s = f('cutlass_library'); s and print(s.submodule_search_locations[0])"
    OUTPUT_VARIABLE cutlass_package OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(CUTLASS_DIR ${cutlass_package}/source)
endif()
set(cutlass "")
if(EXISTS ${CUTLASS_DIR}/include/cutlass/cutlass.h)
  set(cutlass ${cutlass_architectures})
elseif(FEDPFT_CUDA STREQUAL "1")
  message(FATAL_ERROR "FEDPFT_CUDA=1, but CUTLASS was not found: pip install --no-deps nvidia-cutlass, or set CUTLASS_DIR "
    "to a directory with include/cutlass")
else()
  message(STATUS "fedpft: CUTLASS was not found: without its kernels")
endif()

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_ARCHITECTURES ${architectures})
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

# add_cuda_kernels(<target> <architectures> <source>...): .cu files without torch headers.
function(add_cuda_kernels name architectures)
  add_library(${name} OBJECT ${ARGN})
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${architectures}" CUDA_RUNTIME_LIBRARY Static)
  target_compile_options(${name} PRIVATE -Xcompiler=-Wall,-Wextra)
  target_link_libraries(_C PRIVATE ${name})
endfunction()

add_cuda_kernels(cuda_kernels "${architectures}"
  csrc/cuda/activation_moments.cu csrc/cuda/alignment_loss.cu csrc/cuda/dequantize_accumulate.cu
  csrc/cuda/inactivity_count.cu csrc/cuda/neuron_saliency.cu csrc/cuda/quantize_blocks.cu csrc/cuda/sub_ffn.cu)
target_sources(operators PRIVATE csrc/cuda/stream.cpp csrc/cuda/operators.cpp
  csrc/cuda/sub_ffn.cpp csrc/cuda/ffn_gemm.cpp)

# add_cutlass_kernels(<target> <sm_80|sm_90a> <source> [<definition>...]): a .cu file that includes CUTLASS, built if that
# architecture is wanted.
function(add_cutlass_kernels name architecture source)
  if(architecture IN_LIST cutlass)
    string(REPLACE "sm_" "" number ${architecture})
    add_cuda_kernels(${name} ${number}-real ${source})
    target_compile_options(${name} PRIVATE --expt-relaxed-constexpr)
    target_compile_definitions(${name} PRIVATE ${ARGN})
    target_include_directories(${name} SYSTEM PRIVATE ${CUTLASS_DIR}/include ${CUTLASS_DIR}/tools/util/include)
  endif()
endfunction()

# The fused multiplies of ffn_gemm.h: one object per architecture and half type, because each takes minutes to compile.
foreach(half "BFloat16 bfloat16_t" "Float16 half_t")
  separate_arguments(half)
  list(GET half 0 type)
  list(GET half 1 element)
  add_cutlass_kernels(ffn_gemm_sm80_${type} sm_80 csrc/cuda/ffn_gemm_sm80.cu
    FEDPFT_ELEMENT=${element} FEDPFT_GEMMS=kSm80${type})
  add_cutlass_kernels(ffn_gemm_sm90_${type} sm_90a csrc/cuda/ffn_gemm_sm90.cu
    FEDPFT_ELEMENT=${element} FEDPFT_GEMMS=kSm90${type})
endforeach()
set_property(SOURCE csrc/cuda/ffn_gemm.cpp PROPERTY COMPILE_DEFINITIONS
  $<$<IN_LIST:sm_80,${cutlass}>:FEDPFT_SM80> $<$<IN_LIST:sm_90a,${cutlass}>:FEDPFT_SM90A>)

# The runtime is linked in, so the library needs none of a certain version; its symbols are hidden, so it does not meet
# the one that torch brings.
set_target_properties(_C PROPERTIES LINKER_LANGUAGE CXX)
set_target_properties(operators PROPERTIES CXX_VISIBILITY_PRESET hidden)
target_include_directories(operators SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(_C PRIVATE CUDA::cudart_static)
list(JOIN architectures " " architectures)
list(JOIN cutlass " " cutlass)
set_property(SOURCE csrc/module.cpp APPEND PROPERTY COMPILE_DEFINITIONS
  FEDPFT_NVCC="${CMAKE_CUDA_COMPILER_VERSION}" FEDPFT_CUDA_ARCHITECTURES="${architectures}" FEDPFT_CUTLASS="${cutlass}")
message(STATUS "fedpft: CUDA kernels for ${architectures}, with CUTLASS for ${cutlass}")
