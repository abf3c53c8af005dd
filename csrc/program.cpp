#include "program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace d2moe {
namespace {

constexpr int64_t kLookUpNs = 100'000'000; // after which run gives its caller a chance to see that it was interrupted

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Adds the time of a scope to a counter.
class Stopwatch {
public:
  explicit Stopwatch(int64_t& total) : total_(total), begin_ns(now_ns()) {}
  ~Stopwatch() { total_ += now_ns() - begin_ns; }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

private:
  int64_t& total_;

public:
  const int64_t begin_ns;
};

} // namespace

Program::Program(Runtime& rt, const ProgramShape& shape, const Linear& embedding, const Linear& head,
                 const float* final_norm, float eps, std::vector<float> inverse_frequency, float rope_scale, KvCache& kv,
                 Executor& experts, int32_t* ids, int32_t* bits, const Dials& dials)
    : rt_(rt), shape_(shape), embedding_(embedding), head_(head), final_norm_(final_norm), eps_(eps),
      inverse_frequency_(std::move(inverse_frequency)), rope_scale_(rope_scale), kv_(kv), experts_(experts), ids_(ids),
      bits_(bits), dials_(dials), x_(size_t(shape.max_tokens * shape.hidden)), h_(x_.size()), gates_(size_t(shape.max_tokens * shape.top_k)) {}

Program::~Program() = default;

void Program::add_layer(const AttentionShape& shape, const AttentionWeights& attention,
                        const std::optional<RouterWeights>& router, const std::optional<FeedForwardWeights>& feed_forward,
                        const std::optional<WidthRouter>& widths) {
  if (!router && !feed_forward) throw std::invalid_argument("a layer has a router, a feed-forward block or both");
  if (router && moe_count_ == shape_.moe_layers) throw std::invalid_argument("more layers with routers than were announced");
  layers_.push_back({shape, attention, router, feed_forward, widths, router ? moe_count_++ : -1});
}

void Program::start(const int32_t* ids, const TokenPlaces& places, int64_t tokens, int64_t sequences, const int32_t* rows,
                    int64_t count, float* logits) {
  const Stopwatch watch(busy_ns_);
  abandon();
  tokens_ = tokens;
  position_.assign(places.position, places.position + tokens);
  sequence_.assign(places.sequence, places.sequence + tokens);
  tables_.assign(places.block_tables, places.block_tables + sequences * places.table_blocks);
  table_blocks_ = places.table_blocks;
  rows_.assign(rows, rows + count);
  logits_ = logits;
  least_.assign(dials_.least, dials_.least + tokens);
  most_.assign(dials_.most, dials_.most + tokens);
  price_.assign(dials_.price, dials_.price + tokens);
  taken_.assign(size_t(sequences), {});
  next_ = 0;
  noting_ = false;
  turn();
  embed(rt_, embedding_, ids, tokens, x_.data());
}

// All layers turn their heads alike, so this is done once a step.
void Program::turn() {
  const int64_t half = int64_t(inverse_frequency_.size());
  cosine_.resize(size_t(tokens_ * half));
  sine_.resize(size_t(tokens_ * half));
  rt_.pool.parallel_for(tokens_, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = 0; i < half; ++i) {
        const float angle = float(position_[size_t(t)]) * inverse_frequency_[size_t(i)];
        cosine_[size_t(t * half + i)] = float(std::cos(double(angle))) * rope_scale_;
        sine_[size_t(t * half + i)] = float(std::sin(double(angle))) * rope_scale_;
      }
  });
}

// The last layer gives nothing to later tokens but keys and values, so the tokens nobody asks of need no more of it.
void Program::keep_rows() {
  if (int64_t(rows_.size()) == tokens_) return;
  for (size_t i = 0; i < rows_.size(); ++i) { // ascending, so nothing is overwritten that is still to be copied
    const size_t row = size_t(rows_[i]), hidden = size_t(shape_.hidden);
    std::copy_n(x_.data() + row * hidden, hidden, x_.data() + i * hidden);
    sequence_[i] = sequence_[row];
    least_[i] = least_[row];
    most_[i] = most_[row];
    price_[i] = price_[row];
  }
  tokens_ = int64_t(rows_.size());
  noting_ = false; // a note has one number of tokens
}

int64_t Program::run() {
  const Stopwatch watch(busy_ns_);
  const TokenPlaces places{position_.data(), sequence_.data(), tables_.data(), table_blocks_};
  float *x = x_.data(), *h = h_.data();
  for (; next_ < layers_.size(); ++next_) {
    const Layer& layer = layers_[next_];
    if (!routed_) {
      if (now_ns() - watch.begin_ns > kLookUpNs) return kMore;
      attention(rt_, layer.shape, layer.attention, kv_, int64_t(next_), places, {cosine_.data(), sine_.data()}, tokens_, x);
      if (next_ + 1 == layers_.size()) {
        keep_rows();
        if (!tokens_) continue;
      }
      if (!layer.router) {
        feed_forward(rt_, *layer.feed_forward, tokens_, h, x);
        continue;
      }
      route(rt_, *layer.router, tokens_, x, h, ids(layer.moe_index), gates_.data());
      const int32_t* chosen = ids(layer.moe_index);
      int32_t* wide = bits(layer.moe_index);
      choose_widths(rt_, layer.widths ? &*layer.widths : nullptr, shape_.hidden, tokens_, shape_.top_k, x, h, chosen, gates_.data(),
                    {least_.data(), most_.data(), price_.data()}, wide);
      experts_.limit(layer.moe_index, tokens_ * shape_.top_k, chosen, wide);
      routed_ = true;
      experts_.count_wanted(tokens_ * shape_.top_k, chosen, wide, 1, wanted_);
      held_ = pause_ != Pause::decide && experts_.holds(layer.moe_index, tokens_ * shape_.top_k, chosen, wide);
      if (held_)
        note(layer.moe_index);
      else
        noting_ = false;
      if (pause_ != Pause::missing || !(held_ || ledger_)) return layer.moe_index;
    }
    if (!held_ && ledger_) bring(layer.moe_index);
    if (!experts_.begun()) open();
    experts_.compute(nullptr, 0);
    experts_.finish(gates_.data(), x);
    count_taken(layer.moe_index);
    routed_ = false;
  }
  if (tokens_) project(rt_, final_norm_, eps_, head_, tokens_, x, logits_);
  tokens_ = 0;
  for (const WidthCounts& counts : taken_)
    for (size_t b = 0; b < counts.size(); ++b) used_[b] += counts[b];
  return -1;
}

std::vector<std::pair<int64_t, int64_t>> Program::taken() const {
  std::vector<std::pair<int64_t, int64_t>> sums;
  for (const WidthCounts& counts : taken_) {
    auto& [uses, bits] = sums.emplace_back(0, 0);
    for (size_t b = 0; b < counts.size(); ++b) uses += counts[b], bits += counts[b] * int64_t(b);
  }
  return sums;
}

WidthCounts Program::planes_wanted() const {
  WidthCounts planes{};
  for (size_t b = kMaxBits; b >= kBaseBits; --b) planes[b] = wanted_[b] + (b < kMaxBits ? planes[b + 1] : 0); // who wants a plane wants all lower ones
  return planes;
}

void Program::note(int64_t moe_index) {
  const int64_t pairs = tokens_ * shape_.top_k;
  if (!noting_) notes_.push_back({moe_index, 0, tokens_, {}, {}});
  noting_ = true;
  Note& n = notes_.back();
  ++n.layers;
  n.ids.insert(n.ids.end(), ids(moe_index), ids(moe_index) + pairs);
  n.bits.insert(n.bits.end(), bits(moe_index), bits(moe_index) + pairs);
}

void Program::count_taken(int64_t moe_index) {
  const int32_t* wide = bits(moe_index);
  for (int64_t t = 0; t < tokens_; ++t) {
    WidthCounts& counts = taken_[size_t(sequence_[size_t(t)])];
    for (int64_t i = 0; i < shape_.top_k; ++i) ++counts[size_t(wide[t * shape_.top_k + i])];
  }
}

std::vector<Program::Note> Program::take_notes() {
  noting_ = false;
  return std::exchange(notes_, {});
}

void Program::compute(const int32_t* experts, int64_t count) {
  const Stopwatch watch(busy_ns_);
  if (!routed_) throw std::logic_error("compute: no layer is waiting for its experts");
  if (!experts_.begun()) open();
  experts_.compute(experts, count);
}

void Program::choose(const int32_t* widths, const float* gates) {
  if (!routed_ || experts_.begun()) throw std::logic_error("choose: no layer is waiting that has not begun");
  const int64_t pairs = tokens_ * shape_.top_k, layer = layers_[next_].moe_index;
  experts_.count_wanted(pairs, ids(layer), bits(layer), -1, wanted_);
  std::copy_n(widths, pairs, bits(layer));
  experts_.limit(layer, pairs, ids(layer), bits(layer));
  experts_.count_wanted(pairs, ids(layer), bits(layer), 1, wanted_);
  if (gates) std::copy_n(gates, pairs, gates_.data());
}

void Program::forecast(int64_t ahead, int32_t* out) {
  const int64_t k = shape_.top_k, tokens = waiting();
  std::fill_n(out, tokens * ahead * k, -1);
  std::vector<int32_t> ids(size_t(tokens * k));
  std::vector<float> gates(ids.size());
  int64_t step = 0;
  for (size_t l = next_ + 1; l < layers_.size() && step < ahead && tokens; ++l) {
    if (!layers_[l].router) continue;
    if (l + 1 == layers_.size() && int64_t(rows_.size()) != tokens) break;
    pick(rt_, *layers_[l].router, tokens, h_.data(), ids.data(), gates.data());
    for (int64_t t = 0; t < tokens; ++t) std::copy_n(ids.data() + t * k, k, out + (t * ahead + step) * k);
    ++step;
  }
}

void Program::open() {
  const Layer& layer = layers_[next_];
  experts_.begin(layer.moe_index, tokens_, shape_.top_k, h_.data(), ids(layer.moe_index), bits(layer.moe_index));
  // The shared expert is computed while the first planes are on their way.
  if (layer.feed_forward) feed_forward(rt_, *layer.feed_forward, tokens_, h_.data(), x_.data());
}

void Program::bring(int64_t moe_index) {
  const int64_t begin = now_ns();
  for (const Note& n : notes_) ledger_->touch(n.first, n.layers, n.tokens, shape_.top_k, n.ids.data(), n.bits.data());
  notes_.clear();
  const std::vector<Wave> waves = ledger_->plan(moe_index, tokens_, shape_.top_k, ids(moe_index), bits(moe_index), bits(moe_index));
  send(waves[0]);
  const int64_t now = now_ns();
  int64_t missing = 0; // counted from the reads: an early wave may have to evict what a later one wants
  for (const Wave& wave : waves) missing += wave.read_bytes;
  ++planned_.plans;
  planned_.missing_bytes += missing;
  planned_.decide_ns += now - begin;
  if (experts_.logging()) experts_.log({Event::plan, moe_index, int64_t(waves.size()), missing, 0, 0, begin, now});
  for (size_t i = 1; i < waves.size(); ++i) {
    // The next wave's reads run while this one is computed, unless they need its memory.
    const std::vector<int32_t>& mine = waves[i - 1].experts;
    const bool overlap = std::none_of(waves[i].evict.begin(), waves[i].evict.end(), [&](const Move& gone) {
      return gone.layer == moe_index && std::find(mine.begin(), mine.end(), gone.expert) != mine.end();
    });
    if (overlap) send(waves[i]);
    if (!experts_.begun()) open();
    experts_.compute(mine.data(), int64_t(mine.size()));
    if (!overlap) send(waves[i]);
  }
}

void Program::send(const Wave& wave) {
  for (const Move& move : wave.evict) experts_.evict(move.layer, move.expert, move.bits);
  for (const Move& move : wave.read)
    for (int b = std::max(kBaseBits, experts_.width(move.layer, move.expert) + 1); b <= move.bits; ++b) ++planned_.read[size_t(b)];
  experts_.read(wave.read.data(), wave.read.size());
}

void Program::abandon() {
  if (experts_.begun()) experts_.abandon();
  routed_ = false;
  tokens_ = 0;
  next_ = layers_.size();
}

} // namespace d2moe
