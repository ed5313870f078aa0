// What the tests set and read, and an allocator that puts a fence around every tensor.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdio>
#include <new>

#include "emulator.h"

namespace {

constexpr size_t kMargin = 4096;
constexpr std::align_val_t kAlign{64};

int64_t broken_fences = 0;

/// Blank bytes before, in and after each block of memory: a value from outside a tensor, or from one
/// that was never written, is NaN; a write outside is counted when the block is freed.
class FencedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t whole = bytes + 2 * kMargin;
    auto* start = static_cast<unsigned char*>(::operator new(whole, kAlign));
    std::memset(start, emulation::kBlank, whole);
    std::memcpy(start, &bytes, sizeof bytes);
    return {start + kMargin, start + kMargin, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void release(void* data) {
    auto* start = static_cast<unsigned char*>(data) - kMargin;
    size_t bytes;
    std::memcpy(&bytes, start, sizeof bytes);
    const auto* after = start + kMargin + bytes;
    auto damaged = [](unsigned char byte) { return byte != emulation::kBlank; };
    if (std::any_of(start + sizeof bytes, start + kMargin, damaged) ||
        std::any_of(after, after + kMargin, damaged)) {
      ++broken_fences;
    }
    ::operator delete(start, kAlign);
  }
};

FencedAllocator fenced;

}  // namespace

extern "C" {

void emulation_seed(uint32_t seed) { emulation::order.seed(seed); }
int64_t emulation_launches() { return emulation::launches; }
int64_t emulation_broken_fences() { return broken_fences; }
void emulation_fence(bool on) {
#if defined(__SANITIZE_ADDRESS__)
  on = false;  // the sanitizer has its own, and sees no mistake inside ours
#endif
  c10::SetCPUAllocator(on ? &fenced : c10::GetDefaultCPUAllocator());
}
}
