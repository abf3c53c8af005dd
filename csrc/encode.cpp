// One row at a time; plain loops that compilers vectorise. As planes.fit and planes.quantize, operation by operation.
#include "encode.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace d2moe {
namespace {

// The groups' lows and steps of one row, and the scale they are counted in.
float fit_row(const float* w, int64_t cols, int group, int64_t groups, float* low, float* step) {
  float largest = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    float bottom = 0.0f, top = 0.0f;
    for (int64_t i = g * group; i < std::min(cols, (g + 1) * group); ++i) {
      bottom = w[i] < bottom ? w[i] : bottom;
      top = w[i] > top ? w[i] : top;
    }
    low[g] = bottom;
    step[g] = (top - bottom) / 256.0f;
    largest = std::max(largest, step[g]);
  }
  const float unit = largest / 255.0f;
  return unit > 0x1p-100f ? unit : 0.0f; // else 1 / s could overflow
}

} // namespace

void encode_rows(const float* w, int64_t rows, int64_t cols, int group, int64_t tile0, int64_t tile1, uint8_t* tiles,
                 uint8_t* affine, float* row_scale) {
  const int64_t groups = (cols + group - 1) / group;
  std::vector<float> low(static_cast<size_t>(groups)), step(static_cast<size_t>(groups));
  uint8_t codes[256];
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    std::memset(tiles + tile * groups * kTileRows * group, 0, size_t(groups * kTileRows * group));
    std::memset(affine + tile * groups * 2 * kTileRows, 0, size_t(groups * 2 * kTileRows));
    std::memset(row_scale + tile * kTileRows, 0, kTileRows * sizeof(float));
    for (int r = 0; r < kTileRows && tile * kTileRows + r < rows; ++r) {
      const float* row = w + (tile * kTileRows + r) * cols;
      const float unit = fit_row(row, cols, group, groups, low.data(), step.data());
      row_scale[tile * kTileRows + r] = unit;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t block = tile * groups + g;
        const float s8 = unit > 0.0f ? std::min(std::ceil(step[size_t(g)] / unit), 255.0f) : 0.0f;
        const float s = unit * s8, inverse = s > 0.0f ? 1.0f / s : 0.0f;
        const float rounded = s8 > 0.0f ? std::nearbyintf(-low[size_t(g)] / s) : 0.0f;
        const float zero = std::min(std::max(rounded, 0.0f), 255.0f);
        affine[block * 2 * kTileRows + r] = uint8_t(s8);
        affine[block * 2 * kTileRows + kTileRows + r] = uint8_t(zero);
        const int64_t n = std::min(int64_t(group), cols - g * group);
        std::memset(codes, 0, sizeof codes);
        for (int64_t i = 0; i < n; ++i) {
          const float cell = row[g * group + i] * inverse + zero; // what is negative is clipped, hence truncation is floor
          const float above = cell > 0.0f ? cell : 0.0f;
          codes[i] = uint8_t(int32_t(above < 255.0f ? above : 255.0f));
        }
        uint8_t* out = tiles + block * kTileRows * group;
        for (int j = 0; j < group / 4; ++j) std::memcpy(out + j * kRegisterBytes + 4 * r, codes + 4 * j, 4);
      }
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
        for (int f = 0; f < 8; ++f) out[i] |= (in[f][i] >> (5 - p) & kOnes) << kPlaneBit[f];
      }
      std::memcpy(planes[p] + unit * 64, out, sizeof out);
    }
  }
}

} // namespace d2moe
