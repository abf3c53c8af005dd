// What planes are worth and which of them go first: compiled form of d2moe/policy/ledger.py, whose docstrings are the definition.
#pragma once
#include "layout.h"

#include <vector>

namespace d2moe {

constexpr int kSegments = kPlanes + 1; // the base and the planes after it

// Demand of every plane, f64 [layers, experts, kSegments]; numbers of tokens f64 [layers].
struct Demand {
  int64_t layers, experts;
  double *demand, *last, *worth;
  double *tokens, *last_tokens;
};

// Works calls of the layers from `first` on into the demand: ids and bits i32 [count, tokens, top_k].
void value_calls(const Demand& d, int64_t first, int64_t count, int64_t tokens, int64_t top_k, const int32_t* ids, const int32_t* bits,
                 double fade, double last_call);

struct Kept {
  int32_t layer, expert, bits;
};

// Takes the least valuable planes from width i32 [layers, experts] until `short_bytes` are free or nothing is left; experts marked in
// pinned u8 [experts] of pinned_layer stay. `turn` is added to a layer's worth for each layer until it comes again. Answers the experts
// that lost something, in the order in which they first did, and adds what is freed to `freed`.
std::vector<Kept> evict_planes(const Demand& d, int32_t* width, const int64_t* prefix_bytes, int64_t pinned_layer, const uint8_t* pinned,
                               int64_t short_bytes, double turn, int64_t& freed);

} // namespace d2moe
