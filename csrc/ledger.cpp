#include "ledger.h"

#include <algorithm>
#include <unordered_map>

namespace d2moe {

void value_calls(const Demand& d, int64_t first, int64_t count, int64_t tokens, int64_t top_k, const int32_t* ids, const int32_t* bits,
                 double fade, double last_call) {
  const int64_t per = d.experts * kSegments;
  for (int64_t layer = first; layer < first + count; ++layer, ids += tokens * top_k, bits += tokens * top_k) {
    double *demand = d.demand + layer * per, *last = d.last + layer * per, *worth = d.worth + layer * per;
    std::fill(last, last + per, 0.0);
    for (int64_t i = 0; i < tokens * top_k; ++i) // who wants a plane wants all lower ones
      for (int s = 0; s + kBaseBits <= bits[i]; ++s) last[ids[i] * kSegments + s] += 1.0;
    d.tokens[layer] = d.tokens[layer] * fade + double(tokens);
    d.last_tokens[layer] = double(tokens);
    const double share = last_call / double(tokens), seen = d.tokens[layer];
    for (int64_t i = 0; i < per; ++i) {
      demand[i] = demand[i] * fade + last[i];
      worth[i] = demand[i] / seen + share * last[i];
    }
  }
}

namespace {

// The highest plane of an expert; the one that goes first is the greatest.
struct Head {
  double turned, worth;
  int32_t layer, place; // expert * kSegments + plane
  bool operator<(const Head& o) const {
    if (turned != o.turned) return turned > o.turned;
    if (layer != o.layer) return layer > o.layer;
    if (worth != o.worth) return worth > o.worth;
    return place < o.place;
  }
};

} // namespace

std::vector<Kept> evict_planes(const Demand& d, int32_t* width, const int64_t* prefix_bytes, int64_t pinned_layer, const uint8_t* pinned,
                               int64_t short_bytes, double turn, int64_t& freed) {
  const auto head = [&](int64_t layer, int64_t expert) {
    const int64_t place = expert * kSegments + width[layer * d.experts + expert] - kBaseBits;
    const double worth = d.worth[layer * d.experts * kSegments + place];
    return Head{worth + turn * double((pinned_layer - layer + d.layers) % d.layers), worth, int32_t(layer), int32_t(place)};
  };
  std::vector<Head> heads;
  heads.reserve(size_t(d.layers * d.experts));
  for (int64_t layer = 0; layer < d.layers; ++layer)
    for (int64_t expert = 0; expert < d.experts; ++expert)
      if (width[layer * d.experts + expert] && !(layer == pinned_layer && pinned[expert])) heads.push_back(head(layer, expert));
  std::make_heap(heads.begin(), heads.end());
  std::vector<Kept> out;
  std::unordered_map<int64_t, size_t> at; // of an expert in `out`
  while (freed < short_bytes && !heads.empty()) {
    std::pop_heap(heads.begin(), heads.end());
    const int64_t layer = heads.back().layer, expert = heads.back().place / kSegments, index = layer * d.experts + expert;
    heads.pop_back();
    const int32_t was = width[index], now = was == kBaseBits ? 0 : was - 1;
    width[index] = now;
    freed += prefix_bytes[was] - prefix_bytes[now];
    const auto [known, fresh] = at.try_emplace(index, out.size());
    if (fresh) out.push_back({int32_t(layer), int32_t(expert), now});
    out[known->second].bits = now;
    if (now) {
      heads.push_back(head(layer, expert));
      std::push_heap(heads.begin(), heads.end());
    }
  }
  return out;
}

} // namespace d2moe
