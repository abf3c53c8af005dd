#include "reader.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fcntl.h>
#include <new>
#include <random>
#include <stdexcept>
#include <sys/mman.h>
#include <system_error>
#include <unistd.h>

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#endif

namespace d2moe {
namespace {

int64_t steady_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A thread that wakes to start a read is to run before arithmetic that has its CPU, or the disk waits for the end of that one's slice: a
// shorter slice than others' says so. Linux 6.12 and later; elsewhere nothing changes.
void prefer_short_slices() {
#if defined(__linux__) && defined(SYS_sched_setattr)
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period; // runtime: the slice in nanoseconds
  } attributes{};
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0u) || attributes.policy != SCHED_OTHER) return;
  attributes.runtime = 100'000;
  (void)syscall(SYS_sched_setattr, 0, &attributes, 0u);
#endif
}

} // namespace

Reader::Reader(const std::vector<std::string>& paths, bool direct, int depth) : paths_(paths), direct_(direct) {
  for (const std::string& path : paths_) {
    int fd = -1;
#ifdef O_DIRECT
    if (direct_) {
      fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
      if (fd < 0 && errno == EINVAL) direct_ = false; // tmpfs and some network filesystems
    }
#else
    direct_ = false;
#endif
    if (fd < 0) fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
      const int error = errno;
      for (int f : files_) close(f);
      throw std::runtime_error(path + ": cannot be opened: " + std::strerror(error));
    }
    files_.push_back(fd);
  }
  try {
    for (int i = 0; i < depth; ++i) threads_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error&) { // a limit on processes: go on with those that run
  }
}

Reader::~Reader() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  for (auto& t : threads_) t.join();
  for (int f : files_) close(f);
}

void Reader::submit(ReadRequest* const* requests, size_t count, bool may_wait) {
  if (!count) return;
  if (threads_.empty()) {
    for (size_t i = 0; i < count; ++i) serve(*requests[i], 0);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_); // once: the first thread that wakes would hold it against the second request
    std::deque<ReadRequest*>& to = may_wait ? idle_ : queue_;
    to.insert(to.end(), requests, requests + count);
  }
  work_.notify_one(); // the one that wakes wakes the next: the caller has arithmetic to do
}

bool Reader::withdraw(ReadRequest* request) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = std::find(idle_.begin(), idle_.end(), request);
  if (found == idle_.end()) return false;
  idle_.erase(found);
  return true;
}

void Reader::wait(uint64_t seen) {
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [&] { return finished_.load(std::memory_order_acquire) != seen; });
}

void Reader::work(int lane) {
  prefer_short_slices();
  for (;;) {
    ReadRequest* request;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      work_.wait(lock, [&] { return stop_ || !queue_.empty() || (!idle_.empty() && !reading_); });
      std::deque<ReadRequest*>& from = queue_.empty() ? idle_ : queue_;
      if (from.empty()) return;
      ++reading_;
      request = from.front();
      from.pop_front();
      if (!queue_.empty()) work_.notify_one();
    }
    serve(*request, lane);
    std::lock_guard<std::mutex> lock(mutex_);
    if (--reading_ == 0 && !idle_.empty()) work_.notify_one();
  }
}

void Reader::serve(ReadRequest& request, int lane) {
  request.lane = lane;
  request.begin_ns = steady_ns();
  read(request);
  request.end_ns = steady_ns();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    request.done.store(true, std::memory_order_release);
    finished_.fetch_add(1, std::memory_order_release);
  }
  done_.notify_all();
}

void Reader::read(ReadRequest& r) {
  iovec left[kMaxPieces];
  int count = r.piece_count, first = 0;
  std::memcpy(left, r.pieces, sizeof(iovec) * size_t(count));
  const int fd = files_[size_t(r.file)];
  bool refused = false;
  while (r.done_bytes < r.bytes) {
    const ssize_t n = preadv(fd, left + first, count - first, r.offset + r.done_bytes);
    if (n < 0 && errno == EINTR) continue;
#ifdef O_DIRECT
    if (n < 0 && errno == EINVAL && !refused) { // direct reads are refused here, or what is left after a short one is not aligned
      refused = true;
      const int flags = fcntl(fd, F_GETFL); // another thread may have been faster
      if (flags >= 0 && (flags & O_DIRECT)) fcntl(fd, F_SETFL, flags & ~O_DIRECT);
      direct_.store(false, std::memory_order_relaxed);
      continue;
    }
#endif
    if (n < 0) {
      r.error = errno;
      return;
    }
    if (n == 0) return; // the file is shorter than its index says
    r.done_bytes += n;
    for (size_t rest = size_t(n); rest;) {
      iovec& piece = left[first];
      if (rest < piece.iov_len) {
        piece.iov_base = static_cast<char*>(piece.iov_base) + rest;
        piece.iov_len -= rest;
        rest = 0;
      } else {
        rest -= piece.iov_len;
        ++first;
      }
    }
  }
#ifdef POSIX_FADV_DONTNEED
  // Through the page cache the budget would be spent twice, by us and by the kernel.
  if (!direct()) posix_fadvise(fd, r.offset, r.bytes, POSIX_FADV_DONTNEED);
#endif
}

double direct_read_rate(const std::vector<std::string>& paths, const std::vector<int64_t>& offsets, int64_t bytes, int readers, double seconds) {
#ifdef O_DIRECT
  using Clock = std::chrono::steady_clock;
  std::vector<int> files;
  const size_t experts = offsets.size() / paths.size(), room = size_t((bytes + 4095) / 4096 * 4096);
  constexpr size_t kHuge = 2 << 20;
  const size_t held = (room + kHuge - 1) / kHuge * kHuge;
  bool refused = false;
  for (const std::string& path : paths) {
    files.push_back(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT));
    refused |= files.back() < 0;
  }
  std::atomic<int64_t> total{0};
  std::atomic<bool> failed{refused};
  double took = 1.0;
  if (!refused) {
    std::vector<void*> buffers; // as the engine's slots: of huge pages, which are there beforehand
    for (int i = 0; i < readers; ++i) {
      buffers.push_back(::operator new(held, std::align_val_t(kHuge)));
#ifdef MADV_HUGEPAGE
      madvise(buffers.back(), held, MADV_HUGEPAGE);
#endif
      std::memset(buffers.back(), 1, held);
    }
    const auto start = Clock::now();
    const auto since = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
    const auto work = [&](int i) {
      std::mt19937 draw{std::random_device()()};
      while (since() < seconds && !failed) {
        const size_t place = std::uniform_int_distribution<size_t>(0, offsets.size() - 1)(draw);
        const ssize_t n = pread(files[place / experts], buffers[size_t(i)], room, offsets[place]);
        n > 0 ? void(total += n) : void(failed = true);
      }
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < readers; ++i) threads.emplace_back(work, i);
    work(0);
    for (auto& t : threads) t.join();
    took = since();
    for (void* buffer : buffers) ::operator delete(buffer, std::align_val_t(kHuge));
  }
  for (int fd : files)
    if (fd >= 0) close(fd);
  return failed ? 0.0 : double(total.load()) / took;
#else
  return 0.0;
#endif
}

} // namespace d2moe
