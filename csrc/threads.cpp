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
constexpr auto kLinger = std::chrono::microseconds(400); // and what lies between two steps than this: offering its CPU to others, it spins on

} // namespace

Pool::Pool(int threads) {
  if (threads < 1) throw std::invalid_argument("a pool needs at least one thread");
  workers_.reserve(size_t(threads - 1));
  stretches_ = std::vector<Stretch>(size_t(2 * threads));
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error&) { // a limit on processes: go on with those that run, see size()
  }
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    gate_.store(++epoch_ << 32);
  }
  wake_.notify_all();
  for (auto& w : workers_) w.join();
}

// The next piece of a thread's own stretch. Pieces shrink with what is left, so that nobody waits long for the last one.
bool Pool::Stretch::take_front(int64_t& begin, int64_t& end) {
  for (uint64_t seen = left.load(std::memory_order_relaxed);;) {
    const int64_t last = int64_t(seen >> 32);
    begin = int64_t(seen & 0xFFFFFFFF);
    if (begin == last) return false;
    end = begin + (last - begin + 2) / 3;
    if (left.compare_exchange_weak(seen, uint64_t(last) << 32 | uint64_t(end), std::memory_order_relaxed)) return true;
  }
}

// The second half of another's.
bool Pool::Stretch::take_back(int64_t& begin, int64_t& end) {
  for (uint64_t seen = left.load(std::memory_order_relaxed);;) {
    const int64_t first = int64_t(seen & 0xFFFFFFFF);
    end = int64_t(seen >> 32);
    if (first == end) return false;
    begin = first + (end - first) / 2;
    if (left.compare_exchange_weak(seen, uint64_t(begin) << 32 | uint64_t(first), std::memory_order_relaxed)) return true;
  }
}

void Pool::take(int thread) {
  for (int stage = 0; stage < 2; ++stage) {
    Stretch* stretches = &stretches_[size_t(stage * size())];
    for (int other = 0; other < size();) {
      int64_t begin, end;
      if (stretches[thread].take_front(begin, end)) {
        body_(context_, stage, begin * grain_, std::min(end * grain_, n_[stage]), thread);
      } else if (stretches[(thread + other) % size()].take_back(begin, end)) {
        stretches[thread].set(begin, end);
        other = 0;
      } else {
        ++other;
      }
    }
  }
}

void Pool::pause(int spins) {
  relax();
  if (spins > kPolite) std::this_thread::yield(); // who is waited for may be waiting for this very CPU
}

void Pool::run(int64_t first, int64_t second, int64_t grain, Body body, void* context) {
  body_ = body;
  context_ = context;
  n_[0] = first;
  n_[1] = second;
  grain_ = grain;
  for (int stage = 0; stage < 2; ++stage)
    for (int t = 0; t < size(); ++t) {
      const int64_t grains = (n_[stage] + grain - 1) / grain;
      stretches_[size_t(stage * size() + t)].set(grains * t / size(), grains * (t + 1) / size());
    }
  gate_.store(++epoch_ << 32); // sequentially consistent with asleep_: either the worker sees the epoch or we see it asleep
  if (asleep_.load() > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  take(0);
  gate_.fetch_or(kClosed, std::memory_order_relaxed); // nothing is left: who has not come by now need not
  wait_until([&] { return uint32_t(gate_.load(std::memory_order_acquire)) == kClosed; });
}

bool Pool::enter(uint64_t& seen) {
  uint64_t gate = gate_.load(std::memory_order_acquire);
  do seen = gate >> 32;
  while (!(gate & kClosed) && !gate_.compare_exchange_weak(gate, gate + kInside, std::memory_order_acquire));
  return !(gate & kClosed);
}

void Pool::work(int thread) {
  uint64_t seen = 0;
  for (;;) {
    const auto begin = std::chrono::steady_clock::now();
    int spins = 0;
    while (gate_.load() >> 32 == seen) {
      relax();
      if (++spins % 64) continue;
      const auto spun = std::chrono::steady_clock::now() - begin;
      if (spun > kLinger) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return gate_.load() >> 32 != seen; });
        asleep_.fetch_sub(1);
      } else if (spun > kSpin) {
        std::this_thread::yield();
      }
    }
    if (stop_) return;
    if (!enter(seen)) continue;
    take(thread);
    gate_.fetch_sub(kInside, std::memory_order_release);
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
