// What a CUDA kernel needs of a GPU, on one CPU thread: grids, blocks, barriers, shuffles, shared memory.
//
// Each CUDA thread is a coroutine that is suspended where it waits for others. Stricter than a GPU:
// threads and blocks run in random order between barriers, threads of a block must all wait at the
// same line, shared memory begins as NaN and ends in a fence, and a launch that no GPU accepts throws.
#pragma once

#include <algorithm>
#include <coroutine>
#include <cstdint>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __syncthreads() co_await ::emulation::Wait(__LINE__)
#define __shfl_down_sync(mask, value, delta) \
  co_await ::emulation::ShuffleDown<decltype(value)>(mask, value, delta, __LINE__)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() (void)0

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, gridDim;
using cudaStream_t = void*;

namespace c10::cuda {
struct CUDAGuard {
  template <class Device>
  explicit CUDAGuard(const Device&) {}
};
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
}  // namespace c10::cuda

namespace emulation {

constexpr size_t kWarp = 32, kFence = 64, kWidest = 8;
constexpr unsigned char kBlank = 0xff;  // NaN in every floating-point type

inline std::mt19937 order;  // of threads and blocks
inline int64_t launches = 0;
inline std::map<int, std::vector<unsigned char>> shared;  // of the block that runs, by line
inline size_t dynamic_bytes = 0;

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("CUDA emulation: " + what);
}

/// A CUDA thread, and where it waits.
struct Thread {
  struct promise_type {
    int line = 0;  // 0: it does not wait
    size_t delta = 0;  // of the shuffle it waits in; 0: at a barrier
    unsigned char given[kWidest], taken[kWidest];

    Thread get_return_object() { return Thread(*this); }
    std::suspend_always initial_suspend() noexcept { return {}; }
    std::suspend_always final_suspend() noexcept { return {}; }
    void return_void() {}
    void unhandled_exception() { throw; }
  };
  using Handle = std::coroutine_handle<promise_type>;

  explicit Thread(promise_type& promise) : handle(Handle::from_promise(promise)) {}
  Thread(Thread&& other) noexcept : handle(std::exchange(other.handle, nullptr)) {}
  ~Thread() {
    if (handle) handle.destroy();
  }
  promise_type& state() const { return handle.promise(); }

  Handle handle;
};

/// Suspends a thread until the whole block waits at this line.
struct Wait {
  int line;

  explicit Wait(int line) : line(line) {}
  bool await_ready() const { return false; }
  void await_suspend(Thread::Handle thread) { thread.promise().line = line; }
  void await_resume() const {}
};

/// Suspends a thread until its warp waits at this line; yields the value of the lane `delta` further.
template <class T>
struct ShuffleDown {
  T value;
  size_t delta;
  int line;
  Thread::Handle self;

  ShuffleDown(unsigned mask, T value, size_t delta, int line)
      : value(value), delta(delta), line(line) {
    static_assert(sizeof(T) <= kWidest);
    if (mask != 0xffffffffu || delta == 0) fail("a shuffle of a part of a warp, or by nothing");
  }
  bool await_ready() const { return false; }
  void await_suspend(Thread::Handle thread) {
    self = thread;
    self.promise().line = line, self.promise().delta = delta;
    std::memcpy(self.promise().given, &value, sizeof value);
  }
  T await_resume() {
    std::memcpy(&value, self.promise().taken, sizeof value);
    return value;
  }
};

inline unsigned char* shared_bytes(int line, size_t bytes) {
  auto& place = shared[line];
  if (place.empty()) place.assign(bytes + kFence, kBlank);
  return place.data();
}
template <class Array>
Array& shared_array(int line) {
  return *reinterpret_cast<Array*>(shared_bytes(line, sizeof(Array)));
}
inline unsigned char* dynamic_shared() { return shared_bytes(0, dynamic_bytes); }

/// Checks that threads [begin, end) wait together.
inline void check_together(const std::vector<Thread>& threads, size_t begin, size_t end) {
  if (end > threads.size()) fail("a shuffle in an incomplete warp");
  for (size_t i = begin; i < end; ++i) {
    const int here = threads[begin].state().line, there = threads[i].state().line;
    if (here != there) {
      fail(
          "thread " + std::to_string(begin) + " waits at line " + std::to_string(here) +
          ", thread " + std::to_string(i) + " at line " + std::to_string(there) + " (0: ended)");
    }
  }
}

/// Lane i takes what lane i + delta gives; beyond the warp's end it gets its own value back.
inline void exchange(const std::vector<Thread>& threads, size_t warp) {
  check_together(threads, warp, warp + kWarp);
  for (size_t lane = 0; lane < kWarp; ++lane) {
    auto& state = threads[warp + lane].state();
    const size_t from = lane + state.delta < kWarp ? lane + state.delta : lane;
    std::memcpy(state.taken, threads[warp + from].state().given, kWidest);
  }
}

/// The threads that go on: warps out of their shuffles, or else the whole block from its barrier.
inline std::vector<size_t> released(const std::vector<Thread>& threads) {
  std::vector<size_t> result;
  auto add = [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      result.push_back(i);
      threads[i].state().line = 0, threads[i].state().delta = 0;
    }
  };
  auto shuffles = [](const Thread& thread) { return thread.state().delta != 0; };
  for (size_t warp = 0; warp < threads.size(); warp += kWarp) {
    const auto first = threads.begin() + warp;
    const auto last = threads.begin() + std::min(warp + kWarp, threads.size());
    if (std::any_of(first, last, shuffles)) exchange(threads, warp), add(warp, warp + kWarp);
  }
  if (result.empty()) {
    check_together(threads, 0, threads.size());
    if (threads[0].state().line != 0) add(0, threads.size());
  }
  return result;
}

/// Runs one block, whose threads have just been made.
inline void run_block(const std::vector<Thread>& threads, dim3 size) {
  shared.clear();
  std::vector<size_t> ready(threads.size());
  std::iota(ready.begin(), ready.end(), 0);
  for (; !ready.empty(); ready = released(threads)) {
    std::shuffle(ready.begin(), ready.end(), order);
    for (const size_t i : ready) {
      threadIdx = dim3(i % size.x, i / size.x);
      threads[i].handle.resume();
    }
  }
  for (const auto& [line, bytes] : shared) {
    if (std::any_of(bytes.end() - kFence, bytes.end(), [](auto b) { return b != kBlank; })) {
      fail("a write beyond the shared memory of line " + std::to_string(line));
    }
  }
}

inline void check_launch(dim3 grid, dim3 size, size_t bytes) {
  const size_t threads = size_t{size.x} * size.y * size.z;
  const bool most = grid.x <= INT32_MAX && std::max(grid.y, grid.z) <= 65535 && threads <= 1024 &&
                    bytes <= 48 * 1024;
  if (!most || size_t{grid.x} * grid.y * grid.z == 0 || threads == 0 || size.z != 1) {
    fail(
        "a launch of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
        std::to_string(grid.z) + " blocks of " + std::to_string(threads) + " threads with " +
        std::to_string(bytes) + " bytes of shared memory");
  }
}

/// What `kernel<<<grid, size, bytes, stream>>>` is translated to.
template <class... P>
auto launch(Thread (*kernel)(P...), dim3 grid, dim3 size, size_t bytes, cudaStream_t) {
  check_launch(grid, size, bytes);
  return [=](P... arguments) {
    ++launches;
    gridDim = grid, dynamic_bytes = bytes;
    std::vector<size_t> blocks(size_t{grid.x} * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), order);
    for (const size_t i : blocks) {
      blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
      std::vector<Thread> threads;
      for (size_t t = 0; t < size_t{size.x} * size.y; ++t) threads.push_back(kernel(arguments...));
      run_block(threads, size);
    }
  };
}

}  // namespace emulation
