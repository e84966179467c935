// Stands in for the CUDA runtime, so that a plain C++ compiler can build csrc/cuda/*.cu and a CPU can run their
// launchers.
//
// A block's threads are fibers that take turns; they switch only where threads wait for each other. Blocks run one
// after another. So it shows indexing, bounds, barriers and arithmetic, but nothing of speed or of memory ordering.
// Three things make faults visible: emulator_reverse() runs threads and blocks the other way round, and what races then
// differs; a barrier that not all threads reach, and an access to memory that is not there, are errors of the launch.
//
// Limits: warp functions need all 32 lanes, shared memory has static size, atomics are ordinary additions.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

// ------------------------------------------------------------------------------------------------ runtime

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719
};
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorIllegalAddress         ? "illegal address or undefined behaviour, see stderr"
         : error == cudaErrorLaunchFailure        ? "deadlock, see stderr"
         : error == cudaErrorInvalidConfiguration ? "invalid configuration"
                                                  : "invalid value";
}

using cudaStream_t = struct CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

// ------------------------------------------------------------------------------------------------ threads

namespace emulator {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStackBytes = 128 << 10;

// A place where threads wait for each other. `passed` counts how often all of them were there.
struct Barrier {
  int arrived = 0;
  unsigned passed = 0;
};

struct Thread {
  ucontext_t context;
  dim3 index;
  int number;
  const Barrier* waits_at;
  unsigned seen;  // of waits_at->passed when it began to wait
  bool done;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][kWarp];  // in turn: nobody writes again what somebody may still read
};

inline Thread threads[kMostThreads];
inline Warp warps[kMostThreads / kWarp];
inline Barrier block_barrier;
inline ucontext_t scheduler;
inline Thread* current;
inline void (*body)(const void* kernel);
inline const void* kernel;
inline cudaError_t error;
inline bool reversed, progress;

inline void wait(Barrier& barrier, int expected) {
  progress = true;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.passed;
    return;
  }
  current->waits_at = &barrier;
  current->seen = barrier.passed;
  swapcontext(&current->context, &scheduler);
}

inline void enter() {
  body(kernel);
  current->done = progress = true;
  swapcontext(&current->context, &scheduler);
}

inline void report(const char* what) {
  std::fprintf(
      stderr, "CUDA emulator: %s at block (%u, %u, %u), thread (%u, %u, %u)\n", what, blockIdx.x, blockIdx.y,
      blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
}

inline void on_fault(int signal) {
  report(signal == SIGILL ? "undefined behaviour (the sanitizer's trap)" : "memory that is not there");
  error = cudaErrorIllegalAddress;
  setcontext(&scheduler);
}

inline void run_block() {
  static char* stacks = static_cast<char*>(mmap(
      nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  const int count = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  block_barrier = {};
  for (Warp& warp : warps) warp.barrier = {};
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.number = i;
    thread.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    thread.waits_at = nullptr;
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack = {stacks + i * kStackBytes, 0, kStackBytes};
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  for (progress = true; progress && error == cudaSuccess;) {
    progress = false;
    for (int k = 0; k < count && error == cudaSuccess; ++k) {
      Thread& thread = threads[reversed ? count - 1 - k : k];
      if (thread.done || (thread.waits_at && thread.waits_at->passed == thread.seen)) continue;
      thread.waits_at = nullptr;
      current = &thread;
      threadIdx = thread.index;
      swapcontext(&scheduler, &thread.context);
    }
  }
  for (int i = 0; i < count && error == cudaSuccess; ++i) {
    if (!threads[i].done) {
      threadIdx = threads[i].index;
      report("a barrier that not all threads reach");
      error = cudaErrorLaunchFailure;
    }
  }
}

inline cudaError_t run(const cudaLaunchConfig_t& config) {
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  if (blocks == 0 || gridDim.y > 65535 || gridDim.z > 65535 || count == 0 || count > kMostThreads || count % kWarp) {
    return cudaErrorInvalidConfiguration;
  }
  struct sigaction action = {}, segv, bus, ill;
  action.sa_handler = on_fault;
  action.sa_flags = SA_NODEFER;
  sigaction(SIGSEGV, &action, &segv);
  sigaction(SIGBUS, &action, &bus);
  sigaction(SIGILL, &action, &ill);
  error = cudaSuccess;
  for (uint64_t k = 0; k < blocks && error == cudaSuccess; ++k) {
    const uint64_t block = reversed ? blocks - 1 - k : k;
    blockIdx = dim3(block % gridDim.x, block / gridDim.x % gridDim.y, block / (uint64_t{gridDim.x} * gridDim.y));
    run_block();
  }
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
  sigaction(SIGILL, &ill, nullptr);
  return error;
}

// Every lane gives a value and sees those of all.
template <class T>
struct Lanes {
  const uint64_t* values;
  int lane;
  T operator[](int i) const {
    T value;
    std::memcpy(&value, &values[i], sizeof(T));
    return value;
  }
};

template <class T>
Lanes<T> exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) __builtin_trap();
  const int lane = current->number % kWarp;
  Warp& warp = warps[current->number / kWarp];
  uint64_t* values = warp.values[warp.barrier.passed % 2];
  std::memcpy(&values[lane], &value, sizeof(T));
  wait(warp.barrier, kWarp);
  return {values, lane};
}

}  // namespace emulator

extern "C" inline __attribute__((used, visibility("default"))) void emulator_reverse(int on) {
  emulator::reversed = on != 0;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  emulator::kernel = &call;
  emulator::body = [](const void* pointer) {
    const Call& call = *static_cast<const Call*>(pointer);
    std::apply(call.first, call.second);
  };
  return emulator::run(*config);
}

inline void __syncthreads() { emulator::wait(emulator::block_barrier, blockDim.x * blockDim.y * blockDim.z); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::exchange(mask, 0); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulator::exchange(mask, value)[source % emulator::kWarp];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  const auto lanes = emulator::exchange(mask, value);
  return lanes[lanes.lane ^ bits];
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  const auto lanes = emulator::exchange(mask, value);
  return lanes[lanes.lane + distance < emulator::kWarp ? lanes.lane + distance : lanes.lane];
}
inline unsigned __ballot_sync(unsigned mask, int value) {
  const auto lanes = emulator::exchange(mask, value);
  unsigned bits = 0;
  for (int i = 0; i < emulator::kWarp; ++i) bits |= static_cast<unsigned>(lanes[i] != 0) << i;
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// ------------------------------------------------------------------------------------------------ half types

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return x.bits & 0x8000 ? -size : size;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // The distance of neighbours is 2^(exponent - 10); a carry out of the fraction moves the exponent up by itself.
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign + steps + ((exponent + 14) << 10))};
}
