// Asynchronous aligned reads of expert records, past the page cache where the filesystem can.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <sys/uio.h>
#include <thread>
#include <vector>

namespace d2moe {

constexpr int kMaxPieces = 7; // a read fills at most the base and six planes

// One contiguous range of a file into up to seven places in memory. `state` is written by the reader last.
struct ReadRequest {
  int file = -1; // index into the reader's files
  int64_t offset = 0, bytes = 0;
  iovec pieces[kMaxPieces];
  int piece_count = 0;
  int error = 0;          // errno; 0 with done < bytes means the file ended early
  int64_t done_bytes = 0; // what arrived
  int lane = 0;                             // the thread that read it
  int64_t begin_ns = 0, end_ns = 0;         // of the read itself, by the steady clock
  std::atomic<bool> done{false};
};

// Opens the files and reads with `depth` threads of preadv. Completion order is not submission order.
class Reader {
public:
  // Each file is opened with O_DIRECT if `direct`, and without where the filesystem refuses (see direct()). Of `depth` threads those are
  // used that the system lets start (see depth()); without any, submit reads itself.
  Reader(const std::vector<std::string>& paths, bool direct, int depth);
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // Those that may wait are begun when no other is queued or being read, so in the disk's idle time only and one by one.
  void submit(ReadRequest* const* requests, size_t count, bool may_wait = false);
  bool withdraw(ReadRequest* request); // false if it has begun, or was never to wait
  void hurry(ReadRequest* request) {
    if (withdraw(request)) submit(&request, 1);
  }
  // Blocks until some request has finished since `seen` (a value of finished()).
  void wait(uint64_t seen);
  uint64_t finished() const { return finished_.load(std::memory_order_acquire); }
  bool direct() const { return direct_.load(std::memory_order_relaxed); }
  int depth() const { return int(threads_.size()); }
  const std::string& path(int file) const { return paths_[size_t(file)]; }

private:
  void work(int lane);
  void serve(ReadRequest& request, int lane);
  void read(ReadRequest& request);

  std::vector<std::string> paths_;
  std::vector<int> files_;
  std::atomic<bool> direct_;
  std::vector<std::thread> threads_;
  std::deque<ReadRequest*> queue_, idle_;
  int reading_ = 0; // requests that threads are at
  bool stop_ = false;
  std::atomic<uint64_t> finished_{0};
  std::mutex mutex_;
  std::condition_variable work_, done_;
};

// Bytes per second of plain direct reads for so long: `readers` threads, each `bytes` at a time, of record i % experts of file i / experts,
// which begins at offsets[i], i at random. 0 where direct reads are refused.
double direct_read_rate(const std::vector<std::string>& paths, const std::vector<int64_t>& offsets, int64_t bytes, int readers, double seconds);

} // namespace d2moe
