// How many bits a token asks of each of its experts: the width router, docs/routing.md.
#pragma once
#include "dense.h"

namespace d2moe {

// The width router of one layer. The value of plane b (3 to 8) of expert e to a token is, as a logarithm,
//   gate_power * log(gate) + norm_power * log(mean of x^2) + weight[e] . h + planes[e][b - 3]
// and that of each of the first two bits has base[e] there: below its price the expert is left out, at 0 bits.
struct WidthRouter {
  const float* planes = nullptr; // [experts, kPlanes], finite, not ascending along a row
  const float* weight = nullptr; // [experts, hidden] or none
  const float* base = nullptr;   // [experts], finite, or none: every expert has two bits at least
  float gate_power = 0.0f, norm_power = 0.0f;
};

// What the tokens of a step allow: widths from least to most, and within them every plane that is worth its price
// (the logarithm of a value). Where least and most are equal there is nothing to decide.
struct Dials {
  const int32_t *least, *most; // [tokens]
  const float* price;          // [tokens]
};

// bits [tokens, top_k] of the experts ids with gates [tokens, top_k]; x [tokens, hidden] is what was normed to h. Each depends on
// its own token alone, by one order of operations.
void choose_widths(Runtime& rt, const WidthRouter* router, int64_t hidden, int64_t tokens, int64_t top_k, const float* x,
                   const float* h, const int32_t* ids, const float* gates, const Dials& dials, int32_t* bits);

} // namespace d2moe
