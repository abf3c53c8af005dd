// Rounding with error feedback (GPTQ, arXiv 2210.17323) for several widths of one nested code: compiled form of
// convert/feedback.round_columns.
#pragma once
#include "layout.h"

namespace d2moe {

constexpr int kMaxTargets = 7;

// The widths whose error counts, ascending, the last one kMaxBits; `weight` multiplies the squared error in units of the step.
struct Targets {
  int count;
  int bits[kMaxTargets];
  float weight[kMaxTargets];
};

// Rows [row0, row1), whole tiles, of `cols` columns. t f32 [targets, cols, rows]: the weights each width still has to make up
// for, on return each width's error divided by u's diagonal. u f32 [cols, cols]: upper triangle of the factor of the inverse
// Hessian. step, zero f32 [cols, rows]; codes u8 [cols, rows].
void feedback_rows(const Targets& targets, float* t, const float* u, const float* step, const float* zero, int64_t cols,
                   int64_t rows, int64_t row0, int64_t row1, uint8_t* codes);

} // namespace d2moe
