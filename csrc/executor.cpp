#include "executor.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

namespace d2moe {
namespace {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

MatrixShape projection_shape(const ExpertShape& s, int projection) {
  return projection == 2 ? MatrixShape{s.hidden, s.inner, s.group} : MatrixShape{s.inner, s.hidden, s.group};
}

} // namespace

Executor::Executor(Runtime& rt, const ExpertShape& shape, const std::vector<std::string>& paths,
                   std::vector<int64_t> offsets, std::vector<int64_t> kept, bool direct, int depth)
    : rt_(rt), shape_(shape), offsets_(std::move(offsets)), kept_(std::move(kept)),
      whole_(std::all_of(kept_.begin(), kept_.end(), [](int64_t bits) { return bits == kMaxBits; })),
      slots_(shape.base_bytes, shape.layers * shape.experts, shape.plane_bytes, shape.layers * shape.experts * kPlanes),
      experts_(size_t(shape.layers * shape.experts)), widest_(size_t(shape.experts)), reader_(paths, direct, depth) {}

Executor::~Executor() {
  settle_all_quietly(); // no read may land in memory that is gone
}

void Executor::evict(int64_t layer, int64_t expert, int bits) {
  Expert& e = at(layer, expert);
  if (e.request) settle(layer, expert);
  for (int b = e.width; b > std::max(bits, kBaseBits); --b) {
    slots_.free_plane(e.planes[b - kBaseBits - 1]);
    e.planes[b - kBaseBits - 1] = nullptr;
  }
  if (bits < kBaseBits && e.base) {
    slots_.free_base(e.base);
    e.base = nullptr;
  }
  e.width = e.settled = std::min(e.width, bits < kBaseBits ? 0 : bits);
}

void Executor::read(const Move* moves, size_t count, bool may_wait) {
  try {
    for (size_t i = 0; i < count; ++i) {
      ask(moves[i], may_wait);
      if (!i) submit_asked(may_wait); // the disk need not wait for the others' slots
    }
  } catch (...) { // what was asked for before is on its way
    submit_asked(may_wait);
    throw;
  }
  submit_asked(may_wait);
}

void Executor::submit_asked(bool may_wait) {
  reader_.submit(asked_.data(), asked_.size(), may_wait);
  asked_.clear();
}

void Executor::ask(const Move& move, bool may_wait) {
  const int64_t layer = move.layer, expert = move.expert;
  const size_t place = size_t(layer * shape_.experts + expert);
  const int bits = std::min(move.bits, int32_t(kept_[place]));
  Expert& e = at(layer, expert);
  if (bits <= e.width) return;
  if (e.request) {
    submit_asked(may_wait); // it may be among them
    settle(layer, expert);
  }
  auto r = std::make_unique<ReadRequest>();
  r->file = int(layer);
  r->offset = offsets_[place] + (e.width ? shape_.base_bytes + (e.width - kBaseBits) * shape_.plane_bytes : 0);
  const int had = e.width;
  if (!e.width) {
    e.base = slots_.take_base();
    r->pieces[r->piece_count++] = {e.base, size_t(shape_.base_bytes)};
    r->bytes += shape_.base_bytes;
    e.width = kBaseBits;
  }
  while (e.width < bits) {
    uint8_t* plane;
    try {
      plane = slots_.take_plane();
    } catch (...) { // leave the expert as it was
      evict(layer, expert, had);
      throw;
    }
    e.planes[e.width++ - kBaseBits] = plane;
    r->pieces[r->piece_count++] = {plane, size_t(shape_.plane_bytes)};
    r->bytes += shape_.plane_bytes;
  }
  e.request = std::move(r);
  ++on_their_way_;
  counters_.read_bytes += e.request->bytes;
  ++counters_.reads;
  asked_.push_back(e.request.get());
}

void Executor::cancel(int64_t layer, int64_t expert) {
  Expert& e = at(layer, expert);
  if (!e.request || !reader_.withdraw(e.request.get())) return;
  --on_their_way_;
  --counters_.reads;
  counters_.read_bytes -= e.request->bytes;
  e.request.reset();
  evict(layer, expert, e.settled);
}

bool Executor::settle(int64_t layer, int64_t expert) {
  Expert& e = at(layer, expert);
  if (!e.request) return true;
  reader_.hurry(e.request.get());
  for (;;) {
    const uint64_t seen = reader_.finished(); // taken before looking, so that no completion is missed
    if (e.request->done.load(std::memory_order_acquire)) break;
    reader_.wait(seen);
  }
  const std::unique_ptr<ReadRequest> r = std::move(e.request);
  --on_their_way_;
  if (!r->error && r->done_bytes == r->bytes) {
    if (logging_) events_.push_back({Event::read, layer, expert, e.settled, e.width, r->lane, r->begin_ns, r->end_ns});
    e.settled = e.width;
    return true;
  }
  counters_.read_bytes -= r->bytes;
  --counters_.reads;
  const int had = e.settled, wanted = e.width;
  evict(layer, expert, had);
  throw StorageFailure(reader_.path(r->file) + ": expert " + std::to_string(expert) + ", bits " + std::to_string(had + 1) +
                       " to " + std::to_string(wanted) + " (" + std::to_string(r->bytes) + " bytes at offset " +
                       std::to_string(r->offset) + "): " +
                       (r->error ? std::string(std::strerror(r->error))
                                 : "the file ends after " + std::to_string(r->done_bytes) + " of them"));
}

void Executor::settle_all_quietly() {
  for (int64_t i = 0; i < int64_t(experts_.size()) && on_their_way_ > 0; ++i) {
    try {
      settle(i / shape_.experts, i % shape_.experts);
    } catch (const StorageFailure&) {
    }
  }
}

// Where a matrix lies in its expert's slots: docs/format.md, "Expert records".
Matrix Executor::matrix(const Expert& e, int projection) const {
  Matrix m;
  m.shape = projection_shape(shape_, projection);
  const MatrixShape wide = projection_shape(shape_, 0), down = projection_shape(shape_, 2);
  const uint8_t* rows = e.base + 2 * wide.base_bytes() + down.base_bytes();
  const uint8_t* affine = rows + 2 * wide.row_scale_bytes() + down.row_scale_bytes();
  m.base = e.base + projection * wide.base_bytes();
  m.row_scale = reinterpret_cast<const float*>(rows + projection * wide.row_scale_bytes());
  m.affine = affine + projection * wide.affine_bytes();
  for (int p = 0; p < kPlanes; ++p) m.planes[p] = e.planes[p] ? e.planes[p] + projection * wide.plane_bytes() : nullptr;
  return m;
}

void Executor::limit(int64_t layer, int64_t pairs, const int32_t* ids, int32_t* bits) const {
  if (whole_) return;
  const int64_t* kept = kept_.data() + layer * shape_.experts;
  for (int64_t i = 0; i < pairs; ++i) bits[i] = std::min(bits[i], int32_t(kept[ids[i]]));
}

bool Executor::holds(int64_t layer, int64_t pairs, const int32_t* ids, const int32_t* bits) const {
  for (int64_t i = 0; i < pairs; ++i)
    if (at(layer, ids[i]).width < bits[i]) return false;
  return true;
}

void Executor::count_wanted(int64_t pairs, const int32_t* ids, const int32_t* bits, int64_t sign, WidthCounts& wanted) {
  for (int64_t i = 0; i < pairs; ++i) widest_[size_t(ids[i])] = std::max(widest_[size_t(ids[i])], bits[i]);
  for (int64_t i = 0; i < pairs; ++i) {
    int32_t& widest = widest_[size_t(ids[i])];
    if (widest) wanted[size_t(widest)] += sign;
    widest = 0;
  }
}

void Executor::begin(int64_t layer, int64_t tokens, int64_t top_k, const float* h, const int32_t* ids,
                     const int32_t* bits) {
  if (layer_ >= 0) throw std::logic_error("begin: the layer before was not finished");
  const int64_t pairs = tokens * top_k;
  for (int64_t i = 0; i < pairs; ++i)
    if (ids[i] < 0 || ids[i] >= shape_.experts || (bits[i] && bits[i] < kBaseBits) || bits[i] > kMaxBits)
      throw std::invalid_argument("begin: expert " + std::to_string(ids[i]) + " at " + std::to_string(bits[i]) +
                                  " bits does not exist");
  mark_ = rt_.scratch.mark();
  tokens_ = tokens;
  top_k_ = top_k;

  // Gather the tokens of each (expert, width): counting sort over the 7 * experts keys.
  constexpr int64_t kWidths = kMaxBits - kBaseBits + 1;
  std::vector<int64_t> count(size_t(shape_.experts * kWidths + 1), 0);
  const auto key = [&](int64_t i) { return size_t(ids[i] * kWidths + bits[i] - kBaseBits); };
  for (int64_t i = 0; i < pairs; ++i)
    if (bits[i]) ++count[key(i) + 1];
  groups_.clear();
  for (size_t k = 0; k + 1 < count.size(); ++k) {
    const int64_t n = count[k + 1];
    count[k + 1] += count[k];
    if (n) groups_.push_back({int32_t(int64_t(k) / kWidths), int32_t(int64_t(k) % kWidths) + kBaseBits, count[k], n, false});
  }
  row_of_pair_.resize(size_t(pairs));
  pair_at_.resize(size_t(pairs));
  for (int64_t i = 0; i < pairs; ++i) {
    row_of_pair_[size_t(i)] = -1;
    if (!bits[i]) continue;
    const int64_t row = count[key(i)]++;
    row_of_pair_[size_t(i)] = row;
    pair_at_[size_t(row)] = i;
  }
  in_ = quant_rows(rt_, tokens, shape_.hidden, shape_.group);
  rt_.pool.parallel_for(tokens, 4, [&](int64_t a, int64_t b, int) {
    for (int64_t t = a; t < b; ++t) quantize_row(rt_, h + t * shape_.hidden, shape_.hidden, shape_.group, in_, t);
  });
  out_ = rt_.scratch.get<float>(pairs * shape_.hidden);
  layer_ = layer;
}

void Executor::compute(const int32_t* wanted, int64_t count) {
  if (layer_ < 0) throw std::logic_error("compute: no layer was begun");
  std::vector<char> chosen(size_t(shape_.experts), count ? 0 : 1);
  for (int64_t i = 0; i < count; ++i) chosen[size_t(wanted[i])] = 1;
  std::vector<Group*> waiting, ready;
  for (Group& g : groups_)
    if (chosen[size_t(g.expert)] && !g.computed) {
      waiting.push_back(&g);
      if (const auto& request = at(layer_, g.expert).request) reader_.hurry(request.get());
    }
  try {
    while (!waiting.empty()) {
      const uint64_t seen = reader_.finished();
      ready.clear();
      std::vector<Group*> later;
      for (Group* g : waiting) {
        Expert& e = at(layer_, g->expert);
        if (e.settled < g->bits) {
          if (e.width < g->bits)
            throw std::logic_error("compute: layer " + std::to_string(layer_) + " expert " + std::to_string(g->expert) +
                                   " has " + std::to_string(e.width) + " bits and was asked for " + std::to_string(g->bits));
          if (!e.request->done.load(std::memory_order_acquire)) {
            later.push_back(g);
            continue;
          }
          settle(layer_, g->expert);
        }
        ready.push_back(g);
      }
      waiting.swap(later);
      if (ready.empty()) {
        const int64_t begin = now_ns();
        reader_.wait(seen);
        const int64_t end = now_ns();
        counters_.stall_ns += end - begin;
        if (logging_) events_.push_back({Event::wait, layer_, -1, 0, 0, 0, begin, end});
      } else {
        const int64_t begin = now_ns();
        compute_groups(ready);
        const int64_t end = now_ns();
        counters_.compute_ns += end - begin;
        if (logging_)
          for (const Group* g : ready) events_.push_back({Event::compute, layer_, g->expert, 0, g->bits, 0, begin, end});
      }
    }
  } catch (...) {
    abandon();
    throw;
  }
}

void Executor::abandon() {
  settle_all_quietly();
  if (layer_ >= 0) rt_.scratch.release(mark_);
  layer_ = -1;
}

void Executor::compute_groups(const std::vector<Group*>& groups) {
  for (size_t begin = 0; begin < groups.size();) {
    size_t end = begin;
    for (int64_t rows = 0; end < groups.size() && (end == begin || rows + groups[end]->count <= kBatchRows); ++end) rows += groups[end]->count;
    compute_batch(&groups[begin], end - begin);
    begin = end;
  }
}

void Executor::compute_batch(Group* const* groups, size_t n_groups) {
  ScratchScope scope(rt_.scratch);
  int64_t total = 0;
  for (size_t i = 0; i < n_groups; ++i) total += groups[i]->count;
  QuantRows in = quant_rows(rt_, total, shape_.hidden, shape_.group), middle = quant_rows(rt_, total, shape_.inner, shape_.group);
  float *gate = rt_.scratch.get<float>(total * shape_.inner), *up = rt_.scratch.get<float>(total * shape_.inner);
  std::vector<Matrix> matrices;
  matrices.reserve(n_groups * 3);
  std::vector<Product> first, second;
  std::vector<int64_t> token, row_of; // of each row of the batch, of each group's first
  for (size_t i = 0; i < n_groups; ++i) {
    Group& g = *groups[i];
    const int64_t row = int64_t(token.size());
    row_of.push_back(row);
    for (int p = 0; p < 3; ++p) matrices.push_back(matrix(at(layer_, g.expert), p));
    const Matrix* m = &matrices[matrices.size() - 3];
    for (int64_t k = 0; k < g.count; ++k) token.push_back(pair_at_[size_t(g.first + k)] / top_k_);
    const Activations x = g.count == 1 ? in_.row(token.back(), 1) : in.row(row, g.count); // one row needs no gathering
    first.push_back({m, g.bits, x, gate + row * shape_.inner, shape_.inner, nullptr});
    first.push_back({m + 1, g.bits, x, up + row * shape_.inner, shape_.inner, nullptr});
    second.push_back({m + 2, g.bits, middle.row(row, g.count), out_ + g.first * shape_.hidden, shape_.hidden, nullptr});
    g.computed = true;
  }
  if (total > int64_t(n_groups))
    rt_.pool.parallel_for(total, 8, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t t = token[size_t(row)];
        std::memcpy(in.q + row * in.stride, in_.q + t * in.stride, size_t(in.stride));
        std::memcpy(in.scale + row * in.groups, in_.scale + t * in.groups, size_t(in.groups) * 4);
        std::memcpy(in.sum + row * in.groups, in_.sum + t * in.groups, size_t(in.groups) * 4);
      }
    });
  tally(rt_, first);
  tally(rt_, second);
  // No thread waits for all of gate and up: who does the last tile of an expert's makes its input of down.
  const int64_t wide = 2 * projection_shape(shape_, 0).tiles(), narrow = projection_shape(shape_, 2).tiles();
  std::vector<std::atomic<int64_t>> left(n_groups); // tiles of gate and up; -1 when down has its input
  for (auto& n : left) n.store(wide, std::memory_order_relaxed);
  rt_.pool.parallel_stages(int64_t(n_groups) * wide, int64_t(n_groups) * narrow, 4, [&](int stage, int64_t begin, int64_t end, int) {
    const int64_t per_group = stage ? narrow : wide;
    for (int64_t at = begin; at < end;) {
      const int64_t g = at / per_group, upto = std::min(end, (g + 1) * per_group);
      std::atomic<int64_t>& rest = left[size_t(g)];
      if (stage) {
        Pool::wait_until([&] { return rest.load(std::memory_order_acquire) < 0; });
        multiply_tiles(*rt_.table, second[size_t(g)], at - g * narrow, upto - g * narrow);
      } else {
        const int64_t middle_at = g * wide + wide / 2; // where up follows gate
        if (at < middle_at) multiply_tiles(*rt_.table, first[size_t(2 * g)], at - g * wide, std::min(upto, middle_at) - g * wide);
        if (upto > middle_at) multiply_tiles(*rt_.table, first[size_t(2 * g + 1)], std::max(at, middle_at) - middle_at, upto - middle_at);
        if (rest.fetch_sub(upto - at, std::memory_order_acq_rel) == upto - at) {
          for (int64_t i = row_of[size_t(g)]; i < row_of[size_t(g)] + groups[g]->count; ++i)
            inner_row(rt_, gate + i * shape_.inner, up + i * shape_.inner, shape_.inner, shape_.group, shape_.rotation, middle, i);
          rest.store(-1, std::memory_order_release);
        }
      }
      at = upto;
    }
  });
}

void Executor::finish(const float* gates, float* x) {
  if (layer_ < 0) throw std::logic_error("finish: no layer was begun");
  for (const Group& g : groups_)
    if (!g.computed) throw std::logic_error("finish: expert " + std::to_string(g.expert) + " was not computed");
  const int64_t hidden = shape_.hidden;
  constexpr int64_t kColumns = 256;
  const int64_t cuts = (hidden + kColumns - 1) / kColumns;
  rt_.pool.parallel_for(tokens_ * cuts, 16, [&](int64_t begin, int64_t end, int) {
    float sum[kColumns];
    for (int64_t n = begin; n < end; ++n) {
      const int64_t t = n / cuts, first = n % cuts * kColumns, width = std::min(kColumns, hidden - first);
      std::fill(sum, sum + width, 0.0f);
      for (int64_t k = 0; k < top_k_; ++k) { // in the router's order, whatever order they were computed in
        const float gate = gates[t * top_k_ + k];
        const int64_t row = row_of_pair_[size_t(t * top_k_ + k)];
        if (row < 0) continue;
        const float* out = out_ + row * hidden + first;
        for (int64_t i = 0; i < width; ++i) sum[i] += gate * out[i];
      }
      for (int64_t i = 0; i < width; ++i) x[t * hidden + first + i] += sum[i];
    }
  });
  rt_.scratch.release(mark_);
  layer_ = -1;
}

} // namespace d2moe
