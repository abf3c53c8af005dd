// One tile of 16 rows at a time, as one vector; as feedback.descend, operation by operation.
#include "feedback.h"

#include "vectors.h"

#include <cstring>
#include <vector>

namespace d2moe {
namespace {

static_assert(kLanes == kTileRows);
constexpr int kHalfBits = 4, kHalves = 1 << kHalfBits; // a code is chosen in two halves of four bits

// For each target what each half code adds to the value; the middle of the cell is in the half with the last bit that counts.
struct Halves {
  float high[kMaxTargets][kHalves], low[kMaxTargets][kHalves];
  float least[kMaxTargets], most[kMaxTargets]; // of low: what the second half can still reach
  float middle[kMaxTargets];
  int kept[kMaxTargets]; // bits of the whole code that count
  int first_low = 0;     // targets from here on are wider than half a code

  explicit Halves(const Targets& t) {
    for (int k = 0; k < t.count; ++k) {
      const bool wide = t.bits[k] > kHalfBits;
      kept[k] = 0xFF00 >> t.bits[k] & 0xFF;
      middle[k] = 0.5f * float(1 << (kMaxBits - t.bits[k]));
      if (!wide) first_low = k + 1;
      for (int n = 0; n < kHalves; ++n) {
        high[k][n] = float(n << kHalfBits & kept[k]) + (wide ? 0.0f : middle[k]);
        low[k][n] = wide ? float(n & kept[k]) + middle[k] : 0.0f;
      }
      least[k] = low[k][0];
      most[k] = low[k][kHalves - 1];
    }
  }
};

struct Tile {
  Floats wanted[kMaxTargets]; // of each target, in units of the step
  Floats value[kMaxTargets];  // what the code gives
  Floats cost;
  Ints code;

  D2MOE_INLINE void reset() {
    cost = Floats{} + __builtin_inff();
    code = Ints{};
  }
  // Keeps candidate n where it costs less than the best so far.
  D2MOE_INLINE void offer(int n, Floats cost_of_n) {
    const Ints better = cost_of_n < cost;
    cost = better ? cost_of_n : cost;
    code = better ? Ints{} + n : code;
  }

  D2MOE_INLINE void choose(const Targets& t, const Halves& v) {
    const Floats none{};
    reset();
    for (int n = 0; n < kHalves; ++n) {
      Floats c{};
      for (int k = 0; k < t.count; ++k) {
        Floats d = wanted[k] - v.high[k][n];
        if (k >= v.first_low) { // less what the second half can make up for
          const Floats below = d - v.least[k], above = d - v.most[k];
          d = (below < none ? below : none) + (above > none ? above : none);
        }
        c = c + t.weight[k] * (d * d);
      }
      offer(n, c);
    }
    const Ints high = code << kHalfBits;
    Floats rest[kMaxTargets];
    for (int k = v.first_low; k < t.count; ++k) rest[k] = wanted[k] - __builtin_convertvector(high & v.kept[k], Floats);
    reset();
    for (int n = 0; n < kHalves; ++n) {
      Floats c{};
      for (int k = v.first_low; k < t.count; ++k) {
        const Floats d = rest[k] - v.low[k][n];
        c = c + t.weight[k] * (d * d);
      }
      offer(n, c);
    }
    code = code | high;
    for (int k = 0; k < t.count; ++k) value[k] = __builtin_convertvector(code & v.kept[k], Floats) + v.middle[k];
  }
};

} // namespace

D2MOE_CLONES
void descend_rows(const Targets& targets, const float* w, float* e, const float* r, const float* gram, const float* step, const float* zero,
                  int64_t cols, int64_t rows, int64_t row0, int64_t row1, bool fresh, int passes, uint8_t* codes, float* losses) {
  const Halves halves(targets);
  // The tile's own copy: columns of r lie a power of two apart and would fall into the same few cache sets.
  std::vector<float> own(size_t(targets.count * cols * kTileRows));
  const auto column = [&](int k, int64_t j) __attribute__((always_inline)) { return own.data() + (k * cols + j) * kTileRows; };
  Tile tile;
  for (int64_t row = row0; row < row1; row += kTileRows) {
    for (int64_t i = 0; i < targets.count * cols; ++i)
      std::memcpy(own.data() + i * kTileRows, r + i * rows + row, kTileRows * sizeof(float));
    Floats gained[kMaxTargets] = {};
    for (int pass = 0; pass < passes; ++pass)
      for (int64_t j = 0; j < cols; ++j) {
        const Floats s = load(step + j * rows + row), z = load(zero + j * rows + row), weight = load(w + j * rows + row);
        const Floats inverse = s > 0.0f ? 1.0f / s : Floats{};
        const float diagonal = gram[j * cols + j], over = 1.0f / diagonal;
        Floats held{}, cost{}, error[kMaxTargets];
        for (int k = 0; k < targets.count; ++k) {
          error[k] = load(e + (k * cols + j) * rows + row);
          const Floats missing = load(column(k, j)) * over, d = missing * inverse;
          tile.wanted[k] = ((weight - error[k]) + missing) * inverse + z;
          held = held + targets.weight[k] * (d * d);
        }
        tile.choose(targets, halves);
        for (int k = 0; k < targets.count; ++k) {
          const Floats d = tile.wanted[k] - tile.value[k];
          cost = cost + targets.weight[k] * (d * d);
        }
        const Ints better = fresh && pass == 0 ? Ints{} - 1 : (cost < held);
        for (int q = 0; q < kTileRows; ++q)
          if (better[q]) codes[j * rows + row + q] = s[q] > 0.0f ? uint8_t(tile.code[q]) : uint8_t(0);
        const int64_t first = pass + 1 < passes ? 0 : j + 1; // the others do not come again
        for (int k = 0; k < targets.count; ++k) {
          const Floats now = better ? weight - s * (tile.value[k] - z) : error[k], moved = error[k] - now;
          store(e + (k * cols + j) * rows + row, now);
          gained[k] = gained[k] + moved * (moved * diagonal - 2.0f * load(column(k, j)));
          for (int64_t i = first; i < cols; ++i) {
            float* y = column(k, i);
            store(y, load(y) - moved * gram[j * cols + i]);
          }
        }
      }
    for (int k = 0; k < targets.count; ++k) store(losses + k * rows + row, load(losses + k * rows + row) + gained[k]);
  }
}

} // namespace d2moe
