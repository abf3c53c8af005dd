#include "ledger.h"

#include <algorithm>
#include <string>

namespace d2moe {
namespace {

constexpr size_t kNoted = 64; // bounds what notes hold

} // namespace

Ledger::Ledger(int64_t layers_, int64_t experts_, int64_t base_bytes, int64_t plane_bytes, int64_t limit_bytes_, double fade, double last_call)
    : layers(layers_), experts(experts_), limit_bytes(limit_bytes_), width(size_t(layers * experts), 0),
      demand(width.size() * kSegments, 0.0), worth(demand.size(), 0.0), tokens_seen(size_t(layers), 0.0), fade_(fade),
      last_call_(last_call), once_(size_t(experts * kSegments)), found_(width.size(), -1) {
  for (int b = 0; b <= kMaxBits; ++b) prefix[b] = b < kBaseBits ? 0 : base_bytes + plane_bytes * (b - kBaseBits);
}

void Ledger::touch(int64_t first, int64_t count, int64_t tokens, int64_t top_k, const int32_t* ids, const int32_t* bits) {
  const int64_t n = count * tokens * top_k;
  noted_.push_back({first, count, tokens, top_k, {ids, ids + n}, {bits, bits + n}});
  if (noted_.size() >= kNoted) value();
}

void Ledger::value() {
  for (const Note& note : noted_) value(note);
  noted_.clear();
}

void Ledger::value(const Note& note) {
  const int64_t per = experts * kSegments, pairs = note.tokens * note.top_k;
  const int32_t *ids = note.ids.data(), *bits = note.bits.data();
  for (int64_t layer = note.first; layer < note.first + note.count; ++layer, ids += pairs, bits += pairs) {
    double *all = &demand[size_t(layer * per)], *once = once_.data(), *value = &worth[size_t(layer * per)];
    std::fill(once, once + per, 0.0);
    for (int64_t i = 0; i < pairs; ++i) // who wants a plane wants all lower ones
      for (int s = 0; s + kBaseBits <= bits[i]; ++s) once[ids[i] * kSegments + s] += 1.0;
    tokens_seen[size_t(layer)] = tokens_seen[size_t(layer)] * fade_ + double(note.tokens);
    const double share = last_call_ / double(note.tokens), seen = tokens_seen[size_t(layer)];
    for (int64_t i = 0; i < per; ++i) {
      all[i] = all[i] * fade_ + once[i];
      value[i] = all[i] / seen + share * once[i];
    }
  }
}

void Ledger::set(int64_t layer, int64_t expert, int bits) {
  int32_t& has = width[size_t(layer * experts + expert)];
  used_bytes += prefix[bits] - prefix[has];
  has = bits;
}

bool Ledger::Head::operator<(const Head& o) const {
  if (turned != o.turned) return turned > o.turned;
  if (layer != o.layer) return layer > o.layer;
  if (worth != o.worth) return worth > o.worth;
  return place < o.place; // a higher plane before those below it
}

Ledger::Head Ledger::head(int64_t layer, int64_t expert, int64_t pinned_layer) const {
  const int64_t place = expert * kSegments + width[size_t(layer * experts + expert)] - kBaseBits;
  const double value = worth[size_t(layer * experts * kSegments + place)];
  return {value + turn * double((pinned_layer - layer + layers) % layers), value, int32_t(layer), int32_t(place)};
}

bool Ledger::make_room(int64_t n_bytes, int64_t pinned_layer, const uint8_t* pinned, std::vector<Move>& out) {
  if (used_bytes + n_bytes <= limit_bytes) return true;
  value();
  int64_t kept = 0;
  for (int64_t e = 0; e < experts; ++e)
    if (pinned[e]) kept += prefix[width[size_t(pinned_layer * experts + e)]];
  if (kept + n_bytes > limit_bytes) return false;
  heads_.clear();
  for (int64_t layer = 0; layer < layers; ++layer)
    for (int64_t expert = 0; expert < experts; ++expert)
      if (width[size_t(layer * experts + expert)] && !(layer == pinned_layer && pinned[expert]))
        heads_.push_back(head(layer, expert, pinned_layer));
  std::make_heap(heads_.begin(), heads_.end());
  const size_t before = out.size();
  while (used_bytes + n_bytes > limit_bytes) {
    std::pop_heap(heads_.begin(), heads_.end());
    const int64_t layer = heads_.back().layer, expert = heads_.back().place / kSegments;
    heads_.pop_back();
    const size_t index = size_t(layer * experts + expert);
    const int now = width[index] == kBaseBits ? 0 : width[index] - 1;
    set(layer, expert, now);
    if (found_[index] < 0) {
      found_[index] = int32_t(out.size());
      out.push_back({int32_t(layer), int32_t(expert), now});
    }
    out[size_t(found_[index])].bits = now;
    if (now) {
      heads_.push_back(head(layer, expert, pinned_layer));
      std::push_heap(heads_.begin(), heads_.end());
    }
  }
  for (size_t i = before; i < out.size(); ++i) found_[size_t(out[i].layer * experts + out[i].expert)] = -1;
  return true;
}

// Each expert once with the most bits that any token wants of it and the number of tokens, the hottest first: those of equal demand in the
// router's order for one token, which names an expert once, and in that of their numbers for several.
std::vector<Ledger::Item> Ledger::items(int64_t pairs, int64_t tokens, const int32_t* ids, const int32_t* bits) {
  std::vector<Item> out;
  for (int64_t i = 0; i < pairs; ++i) {
    if (!bits[i]) continue; // left out
    int32_t& at = found_[size_t(ids[i])];
    if (at < 0) {
      at = int32_t(out.size());
      out.push_back({ids[i], 0, 0});
    }
    Item& item = out[size_t(at)];
    item.bits = std::max(item.bits, bits[i]);
    ++item.count;
  }
  for (const Item& item : out) found_[size_t(item.expert)] = -1;
  if (tokens > 1)
    std::sort(out.begin(), out.end(), [](const Item& a, const Item& b) { return a.count != b.count ? a.count > b.count : a.expert < b.expert; });
  return out;
}

std::vector<Wave> Ledger::plan(int64_t layer, int64_t tokens, int64_t top_k, const int32_t* ids, const int32_t* bits, const int32_t* asked) {
  touch(layer, 1, tokens, top_k, ids, asked);
  const int32_t* has = &width[size_t(layer * experts)];
  std::vector<Item> order = items(tokens * top_k, tokens, ids, bits);
  // What is resident comes first: it can be computed while the rest is read.
  std::stable_partition(order.begin(), order.end(), [&](const Item& i) { return has[i.expert] >= i.bits; });
  std::vector<int64_t> cost;
  int64_t largest = 0, all = 0;
  for (const Item& item : order) {
    cost.push_back(prefix[std::max(item.bits, has[item.expert])]);
    largest = std::max(largest, cost.back());
    all += cost.back();
  }
  if (largest > limit_bytes)
    throw NoRoom("one expert needs " + std::to_string(largest) + " bytes and the budget leaves " + std::to_string(limit_bytes) +
                 " for experts; allow more memory or fewer bits");
  // All at once, or pieces of half the limit so that two fit side by side.
  const int64_t room = all <= limit_bytes ? all : std::max(limit_bytes / 2, largest);
  std::vector<Wave> waves;
  std::vector<uint8_t> now(size_t(experts), 0), both; // experts of the wave, and of it and the one before
  std::vector<uint8_t> before = now;
  for (size_t begin = 0, end = 0; end < order.size() || waves.empty(); begin = end) {
    for (int64_t filled = 0; end < order.size() && (end == begin || filled + cost[end] <= room); ++end) filled += cost[end];
    std::fill(now.begin(), now.end(), 0);
    for (size_t i = begin; i < end; ++i) now[size_t(order[i].expert)] = 1;
    both = now;
    for (size_t e = 0; e < both.size(); ++e) both[e] |= before[e];
    waves.emplace_back();
    if (!wave(layer, order.data() + begin, end - begin, both.data(), waves.back()) && // two do not fit side by side: let go of the one before
        !wave(layer, order.data() + begin, end - begin, now.data(), waves.back()))
      throw std::logic_error("plan: a wave alone always fits");
    before = now;
  }
  return waves;
}

bool Ledger::wave(int64_t layer, const Item* items, size_t count, const uint8_t* pinned, Wave& out) {
  const int32_t* has = &width[size_t(layer * experts)];
  out = {};
  for (size_t i = 0; i < count; ++i) {
    const Item& item = items[i];
    out.experts.push_back(item.expert);
    if (has[item.expert] >= item.bits) continue;
    out.read.push_back({int32_t(layer), item.expert, item.bits});
    out.read_bytes += prefix[item.bits] - prefix[has[item.expert]];
  }
  if (!make_room(out.read_bytes, layer, pinned, out.evict)) return false;
  for (const Move& move : out.read) set(layer, move.expert, move.bits);
  return true;
}

} // namespace d2moe
