// One tile of rows at a time, in loops over its 16 rows that compilers vectorise; as feedback.round_columns, operation by
// operation.
#include "feedback.h"

#include <cstring>
#include <vector>

// One version for each width of registers, chosen when the program is loaded; all give the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define D2MOE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define D2MOE_CLONES
#endif

namespace d2moe {
namespace {

constexpr int kHalfBits = 4, kHalves = 1 << kHalfBits; // a code is chosen in two halves of four bits

// For each target the value of each half code; the middle of the cell is in the half with the last bit that counts.
struct Halves {
  float high[kMaxTargets][kHalves], low[kMaxTargets][kHalves];
  float least[kMaxTargets], most[kMaxTargets]; // of low: what the second half can still reach
  int first_low = 0;                           // targets from here on are wider than half a code

  explicit Halves(const Targets& t) {
    for (int k = 0; k < t.count; ++k) {
      const bool wide = t.bits[k] > kHalfBits;
      const int kept = 0xFF00 >> t.bits[k];
      const float middle = 0.5f * float(1 << (kMaxBits - t.bits[k]));
      if (!wide) first_low = k + 1;
      for (int n = 0; n < kHalves; ++n) {
        high[k][n] = float(n << kHalfBits & kept & 0xF0) + (wide ? 0.0f : middle);
        low[k][n] = wide ? float(n & kept) + middle : 0.0f;
      }
      least[k] = low[k][0];
      most[k] = low[k][kHalves - 1];
    }
  }
};

struct Tile {
  float wanted[kMaxTargets][kTileRows]; // of each target, in units of the step
  float value[kMaxTargets][kTileRows];  // what the code gives
  float cost[kTileRows];
  int32_t code[kTileRows];

  // Keeps candidate n where it costs less than the best so far.
  inline __attribute__((always_inline)) void offer(int n, const float* cost_of_n) {
    for (int r = 0; r < kTileRows; ++r) {
      const bool better = cost_of_n[r] < cost[r];
      cost[r] = better ? cost_of_n[r] : cost[r];
      code[r] = better ? n : code[r];
    }
  }

  inline __attribute__((always_inline)) void choose(const Targets& t, const Halves& v) {
    float c[kTileRows];
    const auto reset = [&]() __attribute__((always_inline)) {
      for (int r = 0; r < kTileRows; ++r) cost[r] = __builtin_inff(), code[r] = 0;
    };
    reset();
    for (int n = 0; n < kHalves; ++n) {
      for (int r = 0; r < kTileRows; ++r) c[r] = 0.0f;
      for (int k = 0; k < t.count; ++k) {
        const float high = v.high[k][n], least = v.least[k], most = v.most[k], weight = t.weight[k];
        for (int r = 0; r < kTileRows; ++r) {
          float d = wanted[k][r] - high; // beyond the second half's reach counts only
          const float below = d - least, above = d - most;
          d = below < 0.0f ? below : above > 0.0f ? above : 0.0f;
          c[r] = c[r] + weight * (d * d);
        }
      }
      offer(n, c);
    }
    int32_t high[kTileRows];
    std::memcpy(high, code, sizeof high);
    for (int k = 0; k < t.count; ++k)
      for (int r = 0; r < kTileRows; ++r) value[k][r] = v.high[k][high[r]];
    reset();
    for (int n = 0; n < kHalves; ++n) {
      for (int r = 0; r < kTileRows; ++r) c[r] = 0.0f;
      for (int k = v.first_low; k < t.count; ++k) {
        const float low = v.low[k][n], weight = t.weight[k];
        for (int r = 0; r < kTileRows; ++r) {
          const float d = (wanted[k][r] - value[k][r]) - low;
          c[r] = c[r] + weight * (d * d);
        }
      }
      offer(n, c);
    }
    for (int k = v.first_low; k < t.count; ++k)
      for (int r = 0; r < kTileRows; ++r) value[k][r] = value[k][r] + v.low[k][code[r]];
    for (int r = 0; r < kTileRows; ++r) code[r] |= high[r] << kHalfBits;
  }
};

} // namespace

D2MOE_CLONES
void feedback_rows(const Targets& targets, float* t, const float* u, const float* step, const float* zero, int64_t cols,
                   int64_t rows, int64_t row0, int64_t row1, uint8_t* codes) {
  const Halves halves(targets);
  // The tile's own copy: columns of t lie a power of two apart and would fall into the same few cache sets.
  std::vector<float> own(size_t(targets.count * cols * kTileRows));
  const auto column = [&](int k, int64_t j) __attribute__((always_inline)) { return own.data() + (k * cols + j) * kTileRows; };
  Tile tile;
  for (int64_t row = row0; row < row1; row += kTileRows) {
    for (int64_t i = 0; i < targets.count * cols; ++i)
      std::memcpy(own.data() + i * kTileRows, t + i * rows + row, kTileRows * sizeof(float));
    for (int64_t j = 0; j < cols; ++j) {
      const float *s = step + j * rows + row, *z = zero + j * rows + row;
      for (int k = 0; k < targets.count; ++k) {
        const float* w = column(k, j);
        for (int r = 0; r < kTileRows; ++r) {
          const float inverse = s[r] > 0.0f ? 1.0f / s[r] : 0.0f;
          tile.wanted[k][r] = w[r] * inverse + z[r];
        }
      }
      tile.choose(targets, halves);
      for (int r = 0; r < kTileRows; ++r) codes[j * rows + row + r] = s[r] > 0.0f ? uint8_t(tile.code[r]) : uint8_t(0);
      const float diagonal = 1.0f / u[j * cols + j];
      for (int k = 0; k < targets.count; ++k) {
        float* w = column(k, j);
        for (int r = 0; r < kTileRows; ++r) w[r] = (w[r] - s[r] * (tile.value[k][r] - z[r])) * diagonal;
        for (int64_t later = j + 1; later < cols; ++later) {
          float* y = column(k, later);
          const float factor = u[j * cols + later];
          for (int r = 0; r < kTileRows; ++r) y[r] = y[r] - w[r] * factor;
        }
      }
    }
    for (int64_t i = 0; i < targets.count * cols; ++i)
      std::memcpy(t + i * rows + row, own.data() + i * kTileRows, kTileRows * sizeof(float));
  }
}

} // namespace d2moe
