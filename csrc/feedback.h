// Rounding with error feedback for several widths of one nested code: compiled form of convert/feedback.descend.
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

// Chooses the codes of `cols` columns in turn, `passes` times, rows [row0, row1), whole tiles. w, step, zero f32 [cols, rows]; e f32 [targets, cols, rows]:
// what each width is short of w; r f32, same shape: e of all columns times the Hessian; gram f32 [cols, cols]: the Hessian between these
// columns. codes u8 [cols, rows], e and losses f32 [targets, rows] are brought up to date. `fresh`: there are no codes yet.
void descend_rows(const Targets& targets, const float* w, float* e, const float* r, const float* gram, const float* step, const float* zero,
                  int64_t cols, int64_t rows, int64_t row0, int64_t row1, bool fresh, int passes, uint8_t* codes, float* losses);

} // namespace d2moe
