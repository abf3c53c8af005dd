// One tile of 16 rows at a time, as one vector; as feedback.round_columns, operation by operation.
#include "feedback.h"

#include <cstring>
#include <vector>

// One version for each width of registers, chosen when the program is loaded; all give the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define D2MOE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#pragma GCC diagnostic ignored "-Wpsabi" // vectors are passed to inline functions only
#else
#define D2MOE_CLONES
#endif

namespace d2moe {
namespace {

constexpr int kHalfBits = 4, kHalves = 1 << kHalfBits; // a code is chosen in two halves of four bits

typedef float Floats __attribute__((vector_size(4 * kTileRows)));  // of the rows of a tile; compilers cut it into registers
typedef int32_t Ints __attribute__((vector_size(4 * kTileRows)));
#define D2MOE_INLINE inline __attribute__((always_inline))

D2MOE_INLINE Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
D2MOE_INLINE void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

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
        const Floats d = wanted[k] - v.high[k][n], below = d - v.least[k], above = d - v.most[k];
        const Floats beyond = (below < none ? below : none) + (above > none ? above : none); // the second half's reach
        c = c + t.weight[k] * (beyond * beyond);
      }
      offer(n, c);
    }
    const Ints high = code;
    for (int k = 0; k < t.count; ++k)
      for (int r = 0; r < kTileRows; ++r) value[k][r] = v.high[k][high[r]];
    reset();
    for (int n = 0; n < kHalves; ++n) {
      Floats c{};
      for (int k = v.first_low; k < t.count; ++k) {
        const Floats d = (wanted[k] - value[k]) - v.low[k][n];
        c = c + t.weight[k] * (d * d);
      }
      offer(n, c);
    }
    for (int k = v.first_low; k < t.count; ++k)
      for (int r = 0; r < kTileRows; ++r) value[k][r] = value[k][r] + v.low[k][code[r]];
    code = code | high << kHalfBits;
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
      const Floats s = load(step + j * rows + row), z = load(zero + j * rows + row);
      const Floats inverse = s > 0.0f ? 1.0f / s : Floats{};
      for (int k = 0; k < targets.count; ++k) tile.wanted[k] = load(column(k, j)) * inverse + z;
      tile.choose(targets, halves);
      for (int r = 0; r < kTileRows; ++r) codes[j * rows + row + r] = s[r] > 0.0f ? uint8_t(tile.code[r]) : uint8_t(0);
      const float diagonal = 1.0f / u[j * cols + j];
      for (int k = 0; k < targets.count; ++k) {
        const Floats error = (load(column(k, j)) - s * (tile.value[k] - z)) * diagonal;
        store(column(k, j), error);
        for (int64_t later = j + 1; later < cols; ++later) {
          float* y = column(k, later);
          store(y, load(y) - error * u[j * cols + later]);
        }
      }
    }
    for (int64_t i = 0; i < targets.count * cols; ++i)
      std::memcpy(t + i * rows + row, own.data() + i * kTileRows, kTileRows * sizeof(float));
  }
}

} // namespace d2moe
