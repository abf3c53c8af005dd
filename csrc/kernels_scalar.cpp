// The numeric definition of every kernel, and what runs where nothing faster is built. Compiled for the plain CPU.
#include "kernels.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

namespace d2moe {
namespace {

float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7F800000 | mantissa << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else { // zero and subnormals: mantissa * 2^-24 is exact
    float f = float(mantissa) * 0x1p-24f;
    std::memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return sign | 0x7E00;            // NaN
  if (bits >= 0x477FF000) return sign | 0x7C00;           // rounds to infinity
  if (bits < 0x38800000) {                                // subnormal half: let the float adder round
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f; // ulp of 0.5 is 2^-24, the step of subnormal halves
    uint32_t rounded;
    std::memcpy(&rounded, &magnitude, 4);
    return sign | uint16_t(rounded - 0x3F000000);
  }
  const uint32_t odd = bits >> 13 & 1;
  return sign | uint16_t((bits + 0xFFF + odd - (112u << 23)) >> 13);
}

void quantize(const float* x, int64_t cols, int group, int8_t* q, float* scale, int32_t* sum) {
  const int64_t groups = (cols + group - 1) / group;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * group, end = begin + group < cols ? begin + group : cols;
    float largest = 0.0f;
    for (int64_t i = begin; i < end; ++i) largest = std::fmax(largest, std::fabs(x[i]));
    if (!(largest > 0x1p-100f)) largest = 0.0f;
    const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    int32_t total = 0;
    for (int64_t i = begin; i < begin + group; ++i) {
      const int8_t v = i < end ? int8_t(std::nearbyintf(x[i] * inverse)) : int8_t(0);
      q[i] = v;
      total += v;
    }
    scale[g] = largest / 127.0f;
    sum[g] = total;
  }
}

// Codes of one block in register order, the first `bits` bits of each.
void unpack_block(const Matrix& w, int bits, int64_t block, uint8_t* out) {
  const int64_t n = int64_t(kTileRows) * w.shape.group;
  const uint8_t* base = w.base + block * n / 4;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t reg = i / 64, byte = i % 64;
    out[i] = uint8_t((base[reg / 4 * 64 + byte] >> (2 * (reg % 4)) & 3) << 6);
  }
  for (int p = 0; p < bits - kBaseBits; ++p) {
    const uint8_t* plane = w.planes[p] + block * n / 8;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t reg = i / 64, byte = i % 64;
      out[i] |= uint8_t((plane[reg / 8 * 64 + byte] >> kPlaneBit[reg % 8] & 1) << (5 - p));
    }
  }
}

void matmul(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  const int group = w.shape.group;
  const int64_t groups = w.shape.groups(), stride = groups * group;
  const float half = std::ldexp(1.0f, 7 - bits);
  uint8_t codes[kTileRows * 256];
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    const int64_t row0 = tile * kTileRows;
    const int64_t rows = w.shape.rows - row0 < kTileRows ? w.shape.rows - row0 : kTileRows;
    for (int64_t i = 0; i < x.m; ++i)
      for (int64_t r = 0; r < rows; ++r) y[i * ldy + row0 + r] = 0.0f;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t block = tile * groups + g;
      unpack_block(w, bits, block, codes);
      const uint8_t *step = w.affine + block * 2 * kTileRows, *zero = step + kTileRows;
      for (int64_t i = 0; i < x.m; ++i) {
        const int8_t* q = x.q + i * stride + g * group;
        const float sum = float(x.sum[i * groups + g]), scale = x.scale[i * groups + g];
        for (int64_t r = 0; r < rows; ++r) {
          int32_t dot = 0;
          for (int j = 0; j < group / 4; ++j)
            for (int c = 0; c < 4; ++c) dot += int32_t(codes[j * 64 + 4 * r + c]) * q[4 * j + c];
          const float n = float(dot) + (half - float(zero[r])) * sum;
          float& acc = y[i * ldy + row0 + r];
          acc = acc + (scale * n) * float(step[r]);
        }
      }
    }
    for (int64_t i = 0; i < x.m; ++i)
      for (int64_t r = 0; r < rows; ++r) y[i * ldy + row0 + r] *= w.row_scale[row0 + r];
  }
}

const char* variant(int, int64_t) { return "plain loops"; }

// Sums run in `lanes` interleaved lanes, missing elements count as zero, and lanes are added half to half: the order that
// 256- and 512-bit registers can follow exactly.
float add_lanes(float* lane, int lanes) {
  for (int half = lanes / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

float dot_f32(const float* a, const float* b, int64_t n) {
  float lane[32] = {};
  for (int64_t i = 0; i < n; i += 32)
    for (int l = 0; l < 32; ++l) lane[l] += i + l < n ? a[i + l] * b[i + l] : 0.0f;
  return add_lanes(lane, 32);
}

void scores_f16(const uint16_t* keys, int64_t tiles, int64_t head_dim, ConstRows q, int64_t n, Rows scores) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < tiles * kKeyTile; ++j) {
      float acc = 0.0f;
      for (int64_t d = 0; d < head_dim; ++d)
        acc = std::fma(q.data[i * q.stride + d], half_to_float(keys[(j / kKeyTile * head_dim + d) * kKeyTile + j % kKeyTile]), acc);
      scores.data[i * scores.stride + j] = acc;
    }
}

void scores_q8(const uint8_t* keys, const float* key_scale, int64_t tiles, int64_t head_dim, const int8_t* q,
               int64_t q_stride, int64_t n, Rows scores) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < tiles * kKeyTile; ++j) {
      const uint8_t* key = keys + j / kKeyTile * head_dim * kKeyTile + j % kKeyTile * 4;
      int32_t dot = 0;
      for (int64_t d = 0; d < head_dim; ++d) dot += (int32_t(key[d / 4 * 64 + d % 4]) - 128) * q[i * q_stride + d];
      scores.data[i * scores.stride + j] = float(dot) * key_scale[j];
    }
}

void mix_f16(const uint16_t* values, int64_t count, int64_t head_dim, ConstRows p, int64_t n, Rows out) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < count; ++j)
      for (int64_t d = 0; d < head_dim; ++d) {
        float& y = out.data[i * out.stride + d];
        y = std::fma(p.data[i * p.stride + j], half_to_float(values[j * head_dim + d]), y);
      }
}

void mix_q8(const int8_t* values, const float* value_scale, int64_t count, int64_t head_dim, ConstRows p, int64_t n,
            Rows out) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < count; ++j) {
      const float weight = p.data[i * p.stride + j] * value_scale[j];
      for (int64_t d = 0; d < head_dim; ++d) {
        float& y = out.data[i * out.stride + d];
        y = std::fma(weight, float(values[j * head_dim + d]), y);
      }
    }
}

float sum_squares(const float* x, int64_t n) { return dot_f32(x, x, n); }

float power_of_two(int n) {
  const uint32_t bits = uint32_t(n + 127) << 23;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// 2^n * p(r), x = n ln2 + r, |r| <= ln2/2; Taylor to r^6: relative error below 5e-7. 2^n in two factors, so that it under-
// and overflows properly. Own code, not std::exp, so that every table and every C library gives the same bits.
float exponential(float x) {
  x = 150.0f < x ? 150.0f : x;
  x = -150.0f > x ? -150.0f : x;
  if (std::isnan(x)) return x;
  const float n = std::nearbyintf(x * 1.44269504f);
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.0f / 720;
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  const int whole = int(n), part = whole >> 1;
  return p * power_of_two(part) * power_of_two(whole - part);
}

float exp_sum(float* x, float offset, int64_t n) {
  float lane[16] = {};
  for (int64_t i = 0; i < n; ++i) lane[i % 16] += x[i] = exponential(x[i] - offset);
  return add_lanes(lane, 16);
}

void silu_mul(float* gate, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + exponential(0.0f - gate[i])) * up[i];
}

void to_f16(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = float_to_half(x[i]);
}

void to_f32(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = half_to_float(x[i]);
}

uint64_t read_bytes(const uint8_t* p, int64_t n) {
  uint64_t lane[8] = {};
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t v[8];
    std::memcpy(v, p + i, 64);
    for (int l = 0; l < 8; ++l) lane[l] ^= v[l];
  }
  return lane[0] ^ lane[1] ^ lane[2] ^ lane[3] ^ lane[4] ^ lane[5] ^ lane[6] ^ lane[7];
}

} // namespace

const KernelTable kScalarTable = {"scalar", quantize, matmul,      variant, dot_f32,  scores_f16, scores_q8, mix_f16,
                                  mix_q8,   sum_squares, exp_sum, silu_mul, to_f16,     to_f32,    read_bytes};

} // namespace d2moe
