// Plain loops over one group at a time, written so that any compiler makes vector code of them.
#include "encode.h"
#include "kernels.h"

#include <cmath>
#include <cstring>
#include <limits>

// One function for every CPU; where the loader can choose, wider registers make the search twice as fast.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define D2MOE_CLONES __attribute__((target_clones("default", "avx2", "arch=skylake-avx512")))
#else
#define D2MOE_CLONES
#endif

namespace d2moe {
namespace {

constexpr int kMaxGroup = 256;
constexpr int kLanes = 16; // partial sums, so that adding needs no order of its own

// One group of one row, padded to whole lanes with importance 0.
struct Group {
  alignas(64) float w[kMaxGroup], importance[kMaxGroup];
  int n, padded_n;
};

// Range and low end for every clip, as the halves that are stored and as floats.
struct Candidates {
  uint16_t half[2 * kClips];
  float value[2 * kClips]; // ranges, then lows
};

float inverse_of(float range) { return range > 0.0f ? 256.0f / range : 0.0f; }

// floor and clip to 0..255; what is not a number becomes 0.
inline int32_t code_of(float w, float low, float inverse) {
  const float cell = (w - low) * inverse;
  const float above = cell > 0.0f ? cell : 0.0f;
  return int32_t(above < 255.0f ? above : 255.0f);
}

// Weighted squared error of the group at all search widths.
D2MOE_CLONES double loss_of(const Group& group, float range, float low) {
  const float inverse = inverse_of(range), s = range * 0x1p-8f;
  double loss = 0.0;
  alignas(64) float sums[sizeof(kSearchWidths) / sizeof(int)][kLanes] = {};
  for (int i = 0; i < group.padded_n; i += kLanes) {
    int32_t code[kLanes];
    for (int l = 0; l < kLanes; ++l) code[l] = code_of(group.w[i + l], low, inverse);
    int k = 0;
    for (const int bits : kSearchWidths) {
      const int32_t mask = 0xFF00 >> bits;
      const float half = float(1 << (8 - bits)) * 0.5f;
      for (int l = 0; l < kLanes; ++l) {
        const float error = group.w[i + l] - (low + s * (float(code[l] & mask) + half));
        sums[k][l] += group.importance[i + l] * (error * error);
      }
      ++k;
    }
  }
  int k = 0;
  for (const int bits : kSearchWidths) {
    double sum = 0.0;
    for (int l = 0; l < kLanes; ++l) sum += double(sums[k][l]);
    loss += double(int64_t(1) << 2 * bits) * sum;
    ++k;
  }
  return loss;
}

D2MOE_CLONES void codes_of(const Group& group, float range, float low, uint8_t* out) {
  const float inverse = inverse_of(range);
  for (int i = 0; i < group.padded_n; ++i) out[i] = uint8_t(code_of(group.w[i], low, inverse));
}

// Loads the group and gives the candidates of the search.
void prepare(const float* w, int n, Group& group, Candidates& candidates) {
  group.n = n;
  group.padded_n = (n + kLanes - 1) / kLanes * kLanes;
  float top = w[0], bottom = w[0];
  double squares = 0.0;
  for (int i = 0; i < n; ++i) {
    top = w[i] > top ? w[i] : top;
    bottom = w[i] < bottom ? w[i] : bottom;
    squares += double(w[i]) * double(w[i]);
    group.w[i] = w[i];
  }
  const double mean = squares / n;
  for (int i = 0; i < group.padded_n; ++i) {
    if (i >= n) group.w[i] = 0.0f;
    group.importance[i] = i < n ? float(double(w[i]) * double(w[i]) + mean) : 0.0f;
  }
  for (int c = 0; c < kClips; ++c) {
    const float clip = float(1.0 - kClipStep * c);
    candidates.value[c] = (top - bottom) * clip;
    candidates.value[kClips + c] = bottom * clip;
  }
  kScalarTable.to_f16(candidates.value, candidates.half, 2 * kClips);
  kScalarTable.to_f32(candidates.half, candidates.value, 2 * kClips);
}

} // namespace

void encode_rows(const float* w, int64_t rows, int64_t cols, int group, int64_t tile0, int64_t tile1, uint8_t* tiles,
                 uint16_t* affine) {
  const int64_t groups = (cols + group - 1) / group;
  Group part;
  Candidates candidates;
  for (int64_t tile = tile0; tile < tile1; ++tile)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t block = tile * groups + g;
      uint8_t* codes = tiles + block * kTileRows * group;
      uint16_t* scales = affine + block * 2 * kTileRows;
      std::memset(codes, 0, size_t(kTileRows) * size_t(group));
      std::memset(scales, 0, 2 * kTileRows * sizeof(uint16_t));
      const int n = int(g * group + group < cols ? group : cols - g * group);
      for (int r = 0; r < kTileRows && tile * kTileRows + r < rows; ++r) {
        prepare(w + (tile * kTileRows + r) * cols + g * group, n, part, candidates);
        double best = std::numeric_limits<double>::infinity();
        float range = 0.0f, low = 0.0f;
        for (int c = 0; c < kClips; ++c) {
          const double loss = loss_of(part, candidates.value[c], candidates.value[kClips + c]);
          if (!(loss < best)) continue;
          best = loss;
          range = candidates.value[c], low = candidates.value[kClips + c];
          scales[r] = candidates.half[c], scales[kTileRows + r] = candidates.half[kClips + c];
        }
        uint8_t row[kMaxGroup] = {};
        codes_of(part, range, low, row);
        for (int i = n; i < part.padded_n; ++i) row[i] = 0;
        for (int j = 0; j < group / 4; ++j) std::memcpy(codes + j * kRegisterBytes + 4 * r, row + 4 * j, 4);
      }
    }
}

D2MOE_CLONES void pack_units(const uint8_t* tiles, int64_t unit0, int64_t unit1, uint8_t* base, uint8_t* const* planes) {
  for (int64_t unit = unit0; unit < unit1; ++unit) {
    const uint8_t* in = tiles + unit * 512;
    for (int half = 0; half < 2; ++half) {
      uint8_t* out = base + unit * 128 + 64 * half;
      const uint8_t* v = in + 256 * half;
      for (int i = 0; i < 64; ++i)
        out[i] = uint8_t(v[i] >> 6 | (v[64 + i] >> 6) << 2 | (v[128 + i] >> 6) << 4 | (v[192 + i] & 0xC0));
    }
    for (int p = 0; p < kPlanes; ++p) {
      uint8_t word[kRegisterBytes] = {};
      for (int f = 0; f < 8; ++f)
        for (int i = 0; i < kRegisterBytes; ++i) word[i] = uint8_t(word[i] | (in[64 * f + i] >> (5 - p) & 1) << f);
      std::memcpy(planes[p] + unit * 64, word, 64);
    }
  }
}

} // namespace d2moe
