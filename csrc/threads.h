// The compute pool and the scratch memory of one engine.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace d2moe {

// Fork-join over ranges. The caller works too; workers spin for some microseconds between jobs, then sleep. Where the system lets fewer
// threads start than were asked for, those do. Each thread has a stretch of the range and goes through it in order, so that what is read
// ahead of one piece is the next one's; who is done takes the second half of what another has left.
class Pool {
public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return int(workers_.size()) + 1; }

  // f(begin, end, thread) over pieces of [0, n); a piece is at least `grain` long. Results must not depend on the cut.
  template <class F> void parallel_for(int64_t n, int64_t grain, F&& f) {
    if (n <= 0) return;
    if (workers_.empty() || n <= grain) {
      f(int64_t(0), n, 0);
      return;
    }
    run(n, 0, grain, [](void* context, int, int64_t begin, int64_t end, int thread) {
      (*static_cast<std::remove_reference_t<F>*>(context))(begin, end, thread);
    }, &f);
  }

  // f(stage, begin, end, thread) over pieces of [0, first) at stage 0 and of [0, second) at stage 1. All of stage 0 is dealt out before
  // a thread begins with stage 1, but not done: f waits there (`wait_until`) for what it needs.
  template <class F> void parallel_stages(int64_t first, int64_t second, int64_t grain, F&& f) {
    run(first, second, grain, [](void* context, int stage, int64_t begin, int64_t end, int thread) {
      (*static_cast<std::remove_reference_t<F>*>(context))(stage, begin, end, thread);
    }, &f);
  }
  // Spins until done() is true, which another thread brings about that runs.
  template <class F> static void wait_until(F&& done) {
    for (int spins = 0; !done(); ++spins) pause(spins);
  }

private:
  using Body = void (*)(void* context, int stage, int64_t begin, int64_t end, int thread);
  static void pause(int spins);
  void run(int64_t first, int64_t second, int64_t grain, Body body, void* context);
  void work(int thread);
  void take(int thread);
  bool enter(uint64_t& seen); // the job at the gate, whose number `seen` becomes, unless it is over
  // What a thread has left, in grains: begin in the lower half, end in the upper.
  struct alignas(64) Stretch {
    std::atomic<uint64_t> left{0};
    bool take_front(int64_t& begin, int64_t& end);
    bool take_back(int64_t& begin, int64_t& end);
    void set(int64_t begin, int64_t end) { left.store(uint64_t(end) << 32 | uint64_t(begin), std::memory_order_relaxed); }
  };

  std::vector<std::thread> workers_;
  std::vector<Stretch> stretches_; // [2 stages, threads]
  Body body_ = nullptr;
  void* context_ = nullptr;
  int64_t n_[2] = {}, grain_ = 1;
  static constexpr uint64_t kClosed = 1, kInside = 2;
  uint64_t epoch_ = 0;            // jobs so far
  std::atomic<uint64_t> gate_{0}; // the job's number in the upper half, workers inside times kInside, and whether it is closed
  std::atomic<int> asleep_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Bump allocator over one reserved mapping: what is never touched is never resident. Exceeding it is a bug in the
// caller's estimate and throws std::logic_error.
class Scratch {
public:
  explicit Scratch(int64_t capacity);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T> T* get(int64_t count) { return static_cast<T*>(raw(count * int64_t(sizeof(T)))); }
  int64_t mark() const { return used_; }
  void release(int64_t mark) { used_ = mark; }

private:
  void* raw(int64_t bytes);
  char* memory_;
  int64_t capacity_, used_ = 0;
};

// Everything allocated after construction is given back at the end of the scope.
class ScratchScope {
public:
  explicit ScratchScope(Scratch& s) : scratch_(s), mark_(s.mark()) {}
  ~ScratchScope() { scratch_.release(mark_); }
  ScratchScope(const ScratchScope&) = delete;
  ScratchScope& operator=(const ScratchScope&) = delete;

private:
  Scratch& scratch_;
  int64_t mark_;
};

} // namespace d2moe
