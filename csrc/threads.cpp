#include "threads.h"
#include "layout.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <system_error>

namespace d2moe {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kPolite = 2000; // pauses before a spinning thread offers its CPU to others
constexpr auto kSpin = std::chrono::microseconds(60); // a decode step's serial parts are shorter than this

} // namespace

Pool::Pool(int threads) {
  if (threads < 1) throw std::invalid_argument("a pool needs at least one thread");
  workers_.reserve(size_t(threads - 1));
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error&) { // a limit on processes: go on with those that run, see size()
  }
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    epoch_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& w : workers_) w.join();
}

void Pool::take(int thread) {
  // Pieces shrink with what is left: few in all, and nobody waits long for the last one.
  for (int64_t begin = next_.load(std::memory_order_relaxed); begin < n_;) {
    const int64_t grains = std::max((n_ - begin) / (size() * 3 * grain_), int64_t(1)), end = std::min(n_, begin + grains * grain_);
    if (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue; // begin is what another thread left
    body_(context_, begin, end, thread);
    begin = next_.load(std::memory_order_relaxed);
  }
}

void Pool::run(int64_t n, int64_t grain, Body body, void* context) {
  body_ = body;
  context_ = context;
  n_ = n;
  grain_ = grain;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(int(workers_.size()), std::memory_order_relaxed);
  epoch_.fetch_add(1); // sequentially consistent with asleep_: either the worker sees the epoch or we see it asleep
  if (asleep_.load() > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  take(0);
  for (int spins = 0; busy_.load(std::memory_order_acquire) > 0;) {
    relax();
    if (++spins > kPolite) std::this_thread::yield(); // the last worker may be waiting for this very CPU
  }
}

void Pool::work(int thread) {
  uint64_t seen = 0;
  for (;;) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    int spins = 0;
    while (epoch_.load() == seen) {
      relax();
      if (++spins % 64 == 0 && std::chrono::steady_clock::now() > until) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        asleep_.fetch_sub(1);
      }
    }
    ++seen; // one job at a time, and run() waits for all: epochs are never skipped
    if (stop_) return;
    take(thread);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

Scratch::Scratch(int64_t capacity) : capacity_(round_up(capacity, kAlign)) {
  void* p = mmap(nullptr, size_t(capacity_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(p);
}

Scratch::~Scratch() { munmap(memory_, size_t(capacity_)); }

void* Scratch::raw(int64_t bytes) {
  const int64_t begin = used_;
  const int64_t end = begin + round_up(bytes, 64);
  if (end > capacity_)
    throw std::logic_error("scratch memory of " + std::to_string(capacity_) + " bytes is " +
                           std::to_string(end - capacity_) + " bytes too small for this call");
  used_ = end;
  return memory_ + begin;
}

} // namespace d2moe
