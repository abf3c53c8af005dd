// One group at a time, in the small vectors that every CPU has.
#include "encode.h"
#include "kernels.h"

#include <cstring>
#include <limits>

namespace d2moe {
namespace {

constexpr int kMaxGroup = 256;
constexpr int kWidths = int(sizeof(kSearchWidths) / sizeof(int));
constexpr int kLanes = 4;
// Vector types of GCC and Clang: what the compilers make of plain loops here is half as fast.
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

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
double loss_of(const Group& group, float range, float low) {
  const float inverse = inverse_of(range), s = range * 0x1p-8f;
  Floats sums[kWidths] = {};
  for (int i = 0; i < group.padded_n; i += kLanes) {
    Floats w, importance;
    std::memcpy(&w, group.w + i, sizeof w);
    std::memcpy(&importance, group.importance + i, sizeof w);
    Floats cell = (w - low) * inverse;
    cell = cell > 0.0f ? cell : Floats{};
    cell = cell < 255.0f ? cell : Floats{} + 255.0f;
    const Ints code = __builtin_convertvector(cell, Ints);
    for (int k = 0; k < kWidths; ++k) {
      const float half = float(1 << (8 - kSearchWidths[k])) * 0.5f;
      const Floats error = w - (low + s * (__builtin_convertvector(code & (0xFF00 >> kSearchWidths[k]), Floats) + half));
      sums[k] += importance * (error * error);
    }
  }
  double loss = 0.0;
  for (int k = 0; k < kWidths; ++k) {
    double sum = 0.0;
    for (int l = 0; l < kLanes; ++l) sum += double(sums[k][l]);
    loss += double(int64_t(1) << 2 * kSearchWidths[k]) * sum;
  }
  return loss;
}

void codes_of(const Group& group, float range, float low, uint8_t* out) {
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

void pack_units(const uint8_t* tiles, int64_t unit0, int64_t unit1, uint8_t* base, uint8_t* const* planes) {
  constexpr int kWords = kRegisterBytes / 8; // bytes in words of 8, which every compiler shifts in vectors
  constexpr uint64_t kOnes = 0x0101010101010101;
  for (int64_t unit = unit0; unit < unit1; ++unit) {
    uint64_t in[8][kWords], out[kWords];
    std::memcpy(in, tiles + unit * 512, sizeof in);
    for (int half = 0; half < 2; ++half) {
      const auto v = in + 4 * half;
      for (int i = 0; i < kWords; ++i)
        out[i] = (v[0][i] >> 6 & 3 * kOnes) | (v[1][i] >> 4 & 12 * kOnes) | (v[2][i] >> 2 & 48 * kOnes) | (v[3][i] & 192 * kOnes);
      std::memcpy(base + unit * 128 + 64 * half, out, sizeof out);
    }
    for (int p = 0; p < kPlanes; ++p) {
      for (int i = 0; i < kWords; ++i) {
        out[i] = 0;
        for (int f = 0; f < 8; ++f) out[i] |= (in[f][i] >> (5 - p) & kOnes) << f;
      }
      std::memcpy(planes[p] + unit * 64, out, sizeof out);
    }
  }
}

} // namespace d2moe
