// The experts of all layers: which planes are in memory, how they come, and what is computed with them.
// Python decides (evict, read, compute); this class moves and multiplies, and refuses what does not fit together.
#pragma once
#include "dense.h"
#include "reader.h"
#include "slots.h"

#include <array>
#include <memory>
#include <stdexcept>
#include <utility>

namespace d2moe {

// Pairs of token and expert that are computed together: what they need in between stays in the cache.
constexpr int64_t kBatchRows = 512;

// A read failed; the message names file, layer, expert and planes. The expert keeps what it had before.
struct StorageFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct ExpertShape {
  int64_t layers = 0, experts = 0, hidden = 0, inner = 0; // layers: those with experts
  int group = 64;
  int64_t base_bytes = 0, plane_bytes = 0; // padded segments on disk and in a slot
  int rotation = 0;                        // of what down meets, see rotate.h
};

using WidthCounts = std::array<int64_t, kMaxBits + 1>; // by width

struct ExecutorCounters {
  int64_t read_bytes = 0, reads = 0, stall_ns = 0, compute_ns = 0;
};

// What happened when, for a timeline: a read of bits `from` to `to` of an expert, an expert's arithmetic at `to` bits (those that were
// computed together share their times), a wait for reads with nothing to compute, or a plan of `expert` waves that reads `from` bytes.
struct Event {
  enum Kind : int64_t { read, compute, wait, plan };
  int64_t kind, layer, expert, from, to, lane, begin_ns, end_ns;
};

class Executor {
public:
  // paths[l]: file of layer l; offsets[l * experts + e], kept[l * experts + e]: where in it a record begins, and how many bits it has.
  Executor(Runtime& rt, const ExpertShape& shape, const std::vector<std::string>& paths, std::vector<int64_t> offsets,
           std::vector<int64_t> kept, bool direct, int depth);
  ~Executor();

  void set_limit(int64_t bytes) { slots_.set_limit(bytes); }
  int width(int64_t layer, int64_t expert) const { return at(layer, expert).width; }
  // Lowers bits[i] to what the record of ids[i] has.
  void limit(int64_t layer, int64_t pairs, const int32_t* ids, int32_t* bits) const;
  // Whether every expert ids[i] has (or is being read up to) bits[i].
  bool holds(int64_t layer, int64_t pairs, const int32_t* ids, const int32_t* bits) const;
  // Adds `sign` to wanted[b] for each expert of which these choices ask b bits at most.
  void count_wanted(int64_t pairs, const int32_t* ids, const int32_t* bits, int64_t sign, WidthCounts& wanted);
  bool begun() const { return layer_ >= 0; }
  // Keeps only the planes up to `bits` (0: nothing).
  void evict(int64_t layer, int64_t expert, int bits);
  // Starts reading planes so that the experts have their bits, or those that their records have; returns at once. Those that may wait are read when nothing else is to be
  // read, at the latest when they are needed.
  void read(const Move* moves, size_t count, bool may_wait = false);
  // Takes the expert's read back if it may wait and has not begun.
  void cancel(int64_t layer, int64_t expert);

  // One layer's experts on `tokens` rows of h; begin, then any number of compute waves, then finish. Choices of 0 bits are left out.
  void begin(int64_t layer, int64_t tokens, int64_t top_k, const float* h, const int32_t* ids, const int32_t* bits);
  // Computes the pairs of the given experts (all if count is 0): what is resident first, then as reads arrive.
  void compute(const int32_t* experts, int64_t count);
  // x[t] += sum over i, in order, of gates[t, i] * output of its i-th expert.
  void finish(const float* gates, float* x);

  // Forgets a layer that was begun and will not be finished; waits for what is on its way.
  void abandon();

  void log(bool on) { logging_ = on; }
  bool logging() const { return logging_; }
  void log(const Event& event) { events_.push_back(event); }
  std::vector<Event> take_events() { return std::exchange(events_, {}); } // since the last call, while logging

  const ExecutorCounters& counters() const { return counters_; }
  bool direct() const { return reader_.direct(); }
  int depth() const { return reader_.depth(); }

private:
  struct Expert {
    int width = 0;           // bits resident or on their way
    int settled = 0;         // bits resident
    uint8_t* base = nullptr;
    uint8_t* planes[kPlanes] = {};
    std::unique_ptr<ReadRequest> request; // while on its way
  };
  struct Group { // the tokens that want one width of one expert
    int32_t expert, bits;
    int64_t first, count; // pairs in order of expert and width: pair_at_ says which, out_ has its output
    bool computed;
  };

  Expert& at(int64_t layer, int64_t expert) { return experts_[size_t(layer * shape_.experts + expert)]; }
  const Expert& at(int64_t layer, int64_t expert) const { return experts_[size_t(layer * shape_.experts + expert)]; }
  bool settle(int64_t layer, int64_t expert); // true when nothing is on its way; throws StorageFailure
  void settle_all_quietly();
  void ask(const Move& move, bool may_wait); // puts what is to be read into asked_
  void submit_asked(bool may_wait);
  Matrix matrix(const Expert& e, int projection) const;
  void compute_groups(const std::vector<Group*>& groups);
  void compute_batch(Group* const* groups, size_t count);

  Runtime& rt_;
  ExpertShape shape_;
  std::vector<int64_t> offsets_, kept_;
  const bool whole_; // all records have all bits
  Slots slots_;
  std::vector<Expert> experts_;
  std::vector<int32_t> widest_; // of each expert of a layer, all 0 between uses
  Reader reader_;
  std::vector<ReadRequest*> asked_; // and not submitted
  ExecutorCounters counters_;
  int64_t on_their_way_ = 0;
  bool logging_ = false;
  std::vector<Event> events_;

  // Between begin and finish:
  int64_t layer_ = -1, tokens_ = 0, top_k_ = 0, mark_ = 0;
  std::vector<Group> groups_;
  std::vector<int64_t> row_of_pair_, pair_at_; // inverse of each other
  QuantRows in_{};                             // all tokens
  float* out_ = nullptr;                       // [pairs, hidden]
};

} // namespace d2moe
