// Takes the place of csrc/cuda/stream.cpp, and gives torch an allocator that makes every access outside a tensor a
// fault.
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <new>

namespace {

bool at_end;  // else a tensor begins at a page, so that it is aligned as torch's CUDA allocator aligns

struct Mapping {
  void* start;
  size_t bytes;
};

// No page before and none behind; what nobody wrote is not a number.
class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t page = sysconf(_SC_PAGESIZE), body = (bytes + page - 1) / page * page;
    auto* mapping = new Mapping{nullptr, body + 2 * page};
    mapping->start = mmap(nullptr, mapping->bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* data = static_cast<char*>(mapping->start) + page;
    if (mapping->start == MAP_FAILED || (body != 0 && mprotect(data, body, PROT_READ | PROT_WRITE) != 0)) {
      throw std::bad_alloc();
    }
    std::memset(data, 0xff, body);
    const auto release = [](void* context) {
      auto* mapping = static_cast<Mapping*>(context);
      munmap(mapping->start, mapping->bytes);
      delete mapping;
    };
    return {data + (at_end ? body - bytes : 0), mapping, release, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

}  // namespace

// on: 0 torch's own allocator, 1 tensors begin where readable memory begins, 2 they end where it ends.
extern "C" __attribute__((visibility("default"))) void emulator_guard(int on) {
  static GuardedAllocator guarded;
  static c10::Allocator* const usual = c10::GetDefaultCPUAllocator();
  at_end = on == 2;
  c10::SetCPUAllocator(on != 0 ? &guarded : usual, /*priority=*/1);
}
