// Drawing a token from logits; runtime/sampling.py has the definition and the words.
#pragma once
#include "kernels.h"

namespace d2moe {

struct Cuts {
  double temperature; // above 0
  int64_t top_k;      // 0: no limit
  double top_p, min_p;
};

// The token that `uniform` of [0, 1) draws; -1 if the largest logit is not finite or something is not a number.
int64_t draw(const KernelTable& k, const float* logits, int64_t n, const Cuts& cuts, double uniform);

} // namespace d2moe
