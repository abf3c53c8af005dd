#include "encode.h"
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

// One binary for any CPU: the search is compiled for several, and the loader picks.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define D2MOE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define D2MOE_CLONES
#endif

namespace d2moe {
namespace {

// The same constants as planes.py.
constexpr int kClips = 12;
constexpr float kClipStep = 0.04f;
constexpr int kSearchWidths[] = {2, 3, 4, 8};

// Loss of one group at one (range, low), summed over the search widths.
D2MOE_CLONES double group_loss(const float* w, const float* importance, int64_t n, float s, float inverse, float low) {
  float sum[4] = {};
  for (int i = 0; i < 4; ++i) {
    const int bits = kSearchWidths[i];
    const float step = std::ldexp(1.0f, 8 - bits), fraction = std::ldexp(1.0f, bits - 8), half = step * 0.5f;
    float lane[16] = {};
    for (int64_t j = 0; j < n; j += 16)
      for (int l = 0; l < 16; ++l) {
        const float x = w[j + l];
        float cell = (x - low) * inverse;
        cell = cell < 0.0f ? 0.0f : cell > 255.0f ? 255.0f : cell;
        const float kept = float(int32_t(float(int32_t(cell)) * fraction)) * step;
        const float error = x - (low + s * (kept + half));
        lane[l] += importance[j + l] * (error * error);
      }
    for (float v : lane) sum[i] += v;
  }
  double total = 0;
  for (int i = 0; i < 4; ++i) total += std::ldexp(1.0, 2 * kSearchWidths[i]) * double(sum[i]);
  return total;
}

} // namespace

void encode_rows(const float* w, int64_t rows, int64_t cols, int group, int64_t tile0, int64_t tile1, uint8_t* tiles,
                 uint16_t* affine) {
  const MatrixShape shape{rows, cols, group};
  const int64_t groups = shape.groups();
  float part[256], importance[256];
  for (int64_t tile = tile0; tile < tile1; ++tile)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t block = tile * groups + g;
      uint8_t* codes = tiles + block * kTileRows * group;
      uint16_t* pair = affine + block * 2 * kTileRows;
      std::memset(codes, 0, size_t(kTileRows * group));
      std::memset(pair, 0, 4 * kTileRows);
      for (int r = 0; r < kTileRows && tile * kTileRows + r < rows; ++r) {
        const float* row = w + (tile * kTileRows + r) * cols + g * group;
        const int64_t n = std::min<int64_t>(group, cols - g * group);
        float top = row[0], bottom = row[0];
        double mean = 0;
        for (int64_t i = 0; i < n; ++i) {
          top = std::max(top, row[i]);
          bottom = std::min(bottom, row[i]);
          mean += double(row[i]) * row[i];
        }
        mean /= double(n);
        for (int64_t i = 0; i < group; ++i) { // padding has no importance
          part[i] = i < n ? row[i] : 0.0f;
          importance[i] = i < n ? float(double(row[i]) * row[i] + mean) : 0.0f;
        }
        double best = std::numeric_limits<double>::infinity();
        float best_s = 0, best_low = 0;
        uint16_t best_pair[2] = {0, 0};
        for (int c = 0; c < kClips; ++c) {
          const float clip = float(1.0 - 0.04 * c);
          const float wish[2] = {(top - bottom) * clip, bottom * clip};
          uint16_t half[2];
          float real[2];
          kScalarTable.to_f16(wish, half, 2);
          kScalarTable.to_f32(half, real, 2);
          const float s = real[0] * 0x1p-8f, inverse = s > 0 ? 256.0f / real[0] : 0.0f;
          const double loss = group_loss(part, importance, group, s, inverse, real[1]);
          if (loss < best) {
            best = loss;
            best_s = real[0];
            best_low = real[1];
            std::memcpy(best_pair, half, 4);
          }
        }
        pair[r] = best_pair[0];
        pair[kTileRows + r] = best_pair[1];
        const float inverse = best_s > 0 ? 256.0f / best_s : 0.0f;
        for (int64_t i = 0; i < n; ++i) {
          const float cell = std::floor((row[i] - best_low) * inverse);
          codes[i / 4 * kRegisterBytes + 4 * r + i % 4] = uint8_t(cell < 0 ? 0 : cell > 255 ? 255 : cell);
        }
      }
    }
}

} // namespace d2moe
