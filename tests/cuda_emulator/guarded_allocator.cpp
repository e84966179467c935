// Takes the place of csrc/cuda/stream.cpp, and gives torch an allocator that makes every access outside a tensor a
// fault.
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

namespace {

bool at_end;  // else a tensor begins at a page, so that it is aligned as torch's CUDA allocator aligns

struct Mapping {
  void* start;
  size_t bytes;
};

size_t page_bytes() { return sysconf(_SC_PAGESIZE); }

// Pages: the Mapping, none, what torch asked for, none; what nobody wrote is not a number. The context is the memory
// itself, because oneDNN asks for memory without a context of its own.
class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t page = page_bytes(), body = (bytes + page - 1) / page * page;
    const Mapping mapping = {
        mmap(nullptr, body + 3 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), body + 3 * page};
    char* const data = static_cast<char*>(mapping.start) + 2 * page;
    if (mapping.start == MAP_FAILED || mprotect(mapping.start, page, PROT_READ | PROT_WRITE) != 0 ||
        (body != 0 && mprotect(data, body, PROT_READ | PROT_WRITE) != 0)) {
      throw std::bad_alloc();
    }
    std::memcpy(mapping.start, &mapping, sizeof(mapping));
    std::memset(data, 0xff, body);
    char* const first = data + (at_end ? body - bytes : 0);
    return {first, first, release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return release; }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  // The memory begins in the page behind the first two.
  static void release(void* memory) {
    const size_t page = page_bytes();
    Mapping mapping;
    std::memcpy(
        &mapping, reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(memory) / page * page - 2 * page),
        sizeof(mapping));
    munmap(mapping.start, mapping.bytes);
  }
};

}  // namespace

// on: 0 torch's own allocator, 1 tensors begin where readable memory begins, 2 they end where it ends.
extern "C" __attribute__((visibility("default"))) void emulator_guard(int on) {
  static GuardedAllocator guarded;
  static c10::Allocator* const usual = c10::GetDefaultCPUAllocator();
  at_end = on == 2;
  c10::SetCPUAllocator(on != 0 ? &guarded : usual, /*priority=*/1);
}
