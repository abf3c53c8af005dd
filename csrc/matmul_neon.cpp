// Nested products with the dot product instructions of AArch64 (FEAT_DotProd). A quarter of a register of layout.h is 4 rows x
// 4 columns, one int32 lane a row. sdot wants signed bytes, so codes are used less 128; the zero's offset makes that good at
// no cost: sum (code - 128) q + (half + 128 - Z) sum q is the same exact number.
#include "kernels_neon.h"

#include <sys/auxv.h>

namespace d2moe {
namespace {

constexpr int kFewTokens = 4;             // up to here codes are used straight from registers
constexpr int64_t kChunkBytes = 16 << 10; // above, unpacked once to so much of L1, for all tokens
constexpr float kLess = 128.0f;           // what codes are lowered by

// ---- unpacking: 16 bytes (rows 4*part .. 4*part+3) of the 8 registers of a unit of 32 columns -------------------------

// Two-bit fields of registers 0-3 and 4-7: one plane is their upper bit, the next one, where the width has it, the lower.
template <int BITS, int P> inline __attribute__((always_inline)) void plane_fields(const Matrix& w, int64_t at, uint8x16_t (&field)[2]) {
  const uint8x16_t upper = vld1q_u8(w.planes[P] + at), mask = vdupq_n_u8(0xAA);
  if constexpr (P + 1 < BITS - kBaseBits) {
    const uint8x16_t lower = vld1q_u8(w.planes[P + 1] + at);
    field[0] = vbslq_u8(mask, vshlq_n_u8(upper, 1), lower);
    field[1] = vbslq_u8(mask, upper, vshrq_n_u8(lower, 1));
  } else {
    field[0] = vandq_u8(vshlq_n_u8(upper, 1), mask);
    field[1] = vandq_u8(upper, mask);
  }
}

// Nibbles of registers 0, 2 (even) and 1, 3 (odd) of four.
struct Nibbles { uint8x16_t even, odd; };
inline __attribute__((always_inline)) Nibbles nibbles(uint8x16_t upper) {
  const uint8x16_t mask = vdupq_n_u8(0xCC);
  return {vandq_u8(vshlq_n_u8(upper, 2), mask), vandq_u8(upper, mask)};
}
inline __attribute__((always_inline)) Nibbles nibbles(uint8x16_t upper, uint8x16_t lower) {
  const uint8x16_t mask = vdupq_n_u8(0xCC);
  return {vbslq_u8(mask, vshlq_n_u8(upper, 2), lower), vbslq_u8(mask, upper, vshrq_n_u8(lower, 2))};
}

// Codes less 128.
template <int BITS> inline __attribute__((always_inline)) void unpack(const Matrix& w, int64_t unit, int part, int8x16_t (&code)[8]) {
  const int64_t at = unit * 64 + 16 * part;
  uint8x16_t second[2], third[2], fourth[2]; // fields of code bits 5..4, 3..2, 1..0
  if constexpr (BITS > 2) plane_fields<BITS, 0>(w, at, second);
  if constexpr (BITS > 4) plane_fields<BITS, 2>(w, at, third);
  if constexpr (BITS > 6) plane_fields<BITS, 4>(w, at, fourth);
  unrolled<2>([&](auto h) {
    constexpr int H = decltype(h)::value, C = 4 * H;
    const uint8x16_t base = vld1q_u8(w.base + unit * 128 + 64 * H + 16 * part);
    const uint8x16_t first = veorq_u8(base, vdupq_n_u8(0xAA)); // the top bit of every field is worth the 128
    Nibbles high, low;
    if constexpr (BITS > 2) high = nibbles(first, second[H]);
    else high = nibbles(first);
    uint8x16_t out[4];
    if constexpr (BITS > 4) {
      if constexpr (BITS > 6) low = nibbles(third[H], fourth[H]);
      else low = nibbles(third[H]);
      out[0] = vsliq_n_u8(low.even, high.even, 4);
      out[1] = vsliq_n_u8(low.odd, high.odd, 4);
      out[2] = vsriq_n_u8(high.even, low.even, 4);
      out[3] = vsriq_n_u8(high.odd, low.odd, 4);
    } else {
      out[0] = vshlq_n_u8(high.even, 4);
      out[1] = vshlq_n_u8(high.odd, 4);
      out[2] = vandq_u8(high.even, vdupq_n_u8(0xF0));
      out[3] = vandq_u8(high.odd, vdupq_n_u8(0xF0));
    }
    unrolled<4>([&](auto f) { code[C + f.value] = vreinterpretq_s8_u8(out[f.value]); });
  });
}

// ---- the float part: exactly as at KernelTable::matmul ---------------------------------------------------------------

struct Affine {
  float32x4_t step[4], zero[4]; // zero: offset - Z
  inline __attribute__((always_inline)) Affine(const uint8_t* p, float offset) {
    const uint8x16_t s = vld1q_u8(p), z = vld1q_u8(p + kTileRows);
    widen(s, step);
    widen(z, zero);
    unrolled<4>([&](auto r) { zero[r.value] = vsubq_f32(vdupq_n_f32(offset), zero[r.value]); });
  }
  static inline __attribute__((always_inline)) void widen(uint8x16_t v, float32x4_t (&out)[4]) {
    const uint16x8_t low = vmovl_u8(vget_low_u8(v)), high = vmovl_u8(vget_high_u8(v));
    out[0] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(low)));
    out[1] = vcvtq_f32_u32(vmovl_u16(vget_high_u16(low)));
    out[2] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(high)));
    out[3] = vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)));
  }
  inline __attribute__((always_inline)) void add(const int32x4_t (&dot)[4], float sum, float scale, float* acc) const {
    unrolled<4>([&](auto r) {
      constexpr int R = decltype(r)::value;
      const float32x4_t n = vaddq_f32(vcvtq_f32_s32(dot[R]), vmulq_n_f32(zero[R], sum));
      vst1q_f32(acc + 4 * R, vaddq_f32(vld1q_f32(acc + 4 * R), vmulq_f32(vmulq_n_f32(n, scale), step[R])));
    });
  }
};

// y = acc * row_scale for `n` tokens and the rows that there are.
void finish(const Matrix& w, int64_t tile, int64_t n, const float* acc, float* y, int64_t ldy) {
  const int64_t row0 = tile * kTileRows, rows = least(w.shape.rows - row0, kTileRows);
  const float* scale = w.row_scale + row0;
  for (int64_t i = 0; i < n; ++i, acc += kTileRows) {
    float* out = y + i * ldy + row0;
    for (int64_t r = 0; rows == kTileRows && r < rows; r += 4) vst1q_f32(out + r, vmulq_f32(vld1q_f32(acc + r), vld1q_f32(scale + r)));
    for (int64_t r = 0; rows < kTileRows && r < rows; ++r) out[r] = acc[r] * scale[r];
  }
}

inline float half_of(int bits) { return float(1 << (8 - bits)) * 0.5f; }

// ---- few tokens: bound by memory or by unpacking -----------------------------------------------------------------------

// Adds 32 columns of T tokens.
template <int BITS, int T>
inline __attribute__((always_inline)) void add_unit(const Matrix& w, int64_t unit, const int8_t* q, int64_t stride, int32x4_t (&dot)[T][4]) {
  int8x16_t x[T][2];
  unrolled<2 * T>([&](auto k) { x[k.value / 2][k.value % 2] = vld1q_s8(q + k.value / 2 * stride + k.value % 2 * 16); });
  unrolled<4>([&](auto part) {
    constexpr int kPart = decltype(part)::value;
    int8x16_t code[8];
    unpack<BITS>(w, unit, kPart, code);
    unrolled<8 * T>([&](auto k) {
      constexpr int F = decltype(k)::value / T, I = decltype(k)::value % T;
      dot[I][kPart] = vdotq_laneq_s32(dot[I][kPart], code[F], x[I][F / 4], F % 4);
    });
  });
}

template <int BITS, int T>
void multiply_few(const Matrix& w, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  const int group = w.shape.group, units = group / 32;
  const int64_t groups = w.shape.groups(), stride = groups * group;
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    float acc[T * kTileRows] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t block = tile * groups + g;
      int32x4_t dot[T][4];
      unrolled<4 * T>([&](auto k) { dot[k.value / 4][k.value % 4] = vdupq_n_s32(0); });
      for (int u = 0; u < units; ++u) add_unit<BITS, T>(w, block * units + u, x.q + g * group + 32 * u, stride, dot);
      const Affine affine(w.affine + block * 2 * kTileRows, half_of(BITS) + kLess);
      unrolled<T>([&](auto i) {
        affine.add(dot[i.value], float(x.sum[i.value * groups + g]), x.scale[i.value * groups + g], acc + i.value * kTileRows);
      });
    }
    finish(w, tile, T, acc, y, ldy);
  }
}

// Two bits and one token, where unpacking takes longest: fields stay where they are, except the top one, which is in the way
// of the sign, and the sums are shifted instead of the codes.
void multiply_fields(const Matrix& w, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  const int group = w.shape.group, words = group / 16;
  const int64_t groups = w.shape.groups();
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    float acc[kTileRows] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t block = tile * groups + g;
      int32x4_t sum[3][4], dot[4]; // sums worth 64, 16 and 4
      unrolled<12>([&](auto k) { sum[k.value / 4][k.value % 4] = vdupq_n_s32(0); });
      for (int i = 0; i < words; ++i) {
        const int8x16_t q = vld1q_s8(x.q + g * group + 16 * i);
        unrolled<4>([&](auto part) {
          constexpr int kPart = decltype(part)::value;
          const uint8x16_t word = vld1q_u8(w.base + (block * words + i) * 64 + 16 * kPart);
          const auto field = [&](int mask) { return vreinterpretq_s8_u8(vandq_u8(word, vdupq_n_u8(uint8_t(mask)))); };
          sum[0][kPart] = vdotq_laneq_s32(sum[0][kPart], field(0x03), q, 0);
          sum[1][kPart] = vdotq_laneq_s32(sum[1][kPart], field(0x0C), q, 1);
          sum[2][kPart] = vdotq_laneq_s32(sum[2][kPart], field(0x30), q, 2);
          sum[0][kPart] = vdotq_laneq_s32(sum[0][kPart], vreinterpretq_s8_u8(vshrq_n_u8(word, 6)), q, 3);
        });
      }
      unrolled<4>([&](auto p) {
        constexpr int kPart = decltype(p)::value;
        dot[kPart] = vaddq_s32(vaddq_s32(vshlq_n_s32(sum[0][kPart], 6), vshlq_n_s32(sum[1][kPart], 4)), vshlq_n_s32(sum[2][kPart], 2));
      });
      Affine(w.affine + block * 2 * kTileRows, half_of(2)).add(dot, float(x.sum[g]), x.scale[g], acc);
    }
    finish(w, tile, 1, acc, y, ldy);
  }
}

// ---- many tokens: bound by arithmetic ------------------------------------------------------------------------------------

// Codes of `count` units: in register order, or, for smmla, in 2 x 8 matrices as NeonChunk wants them.
template <int BITS, bool PAIRS> void unpack_units(const Matrix& w, int64_t unit0, int64_t count, int8_t* out) {
  for (int64_t unit = unit0; unit < unit0 + count; ++unit, out += 512)
    unrolled<4>([&](auto part) {
      int8x16_t code[8];
      unpack<BITS>(w, unit, part.value, code);
      unrolled<8>([&](auto f) {
        constexpr int F = decltype(f)::value, kPart = decltype(part)::value;
        if constexpr (PAIRS) {
          const int32x4_t a = vreinterpretq_s32_s8(code[F & ~1]), b = vreinterpretq_s32_s8(code[F | 1]);
          vst1q_s8(out + 64 * (F & ~1) + 32 * kPart + 16 * (F & 1), vreinterpretq_s8_s32(F & 1 ? vzip2q_s32(a, b) : vzip1q_s32(a, b)));
        } else {
          vst1q_s8(out + 64 * F + 16 * kPart, code[F]);
        }
      });
    });
}

template <int T> void dot_chunk(const NeonChunk& c, const Activations& x, int64_t groups, int64_t i0, float* acc) {
  const int64_t stride = groups * c.group;
  const int8_t *q = x.q + i0 * stride + c.group0 * c.group, *codes = c.codes;
  for (int64_t g = 0; g < c.count; ++g) {
    int32x4_t dot[T][4];
    unrolled<4 * T>([&](auto k) { dot[k.value / 4][k.value % 4] = vdupq_n_s32(0); });
    for (int j = 0; j < c.group; j += 16, q += 16, codes += 256) {
      int8x16_t v[T];
      unrolled<T>([&](auto i) { v[i.value] = vld1q_s8(q + i.value * stride); });
      unrolled<16>([&](auto k) {
        constexpr int F = decltype(k)::value / 4, kPart = decltype(k)::value % 4;
        const int8x16_t code = vld1q_s8(codes + 64 * F + 16 * kPart);
        unrolled<T>([&](auto i) { dot[i.value][kPart] = vdotq_laneq_s32(dot[i.value][kPart], code, v[i.value], F); });
      });
    }
    const Affine affine(c.affine + g * 2 * kTileRows, c.offset);
    unrolled<T>([&](auto i) {
      const int64_t at = (i0 + i.value) * groups + c.group0 + g;
      affine.add(dot[i.value], float(x.sum[at]), x.scale[at], acc + i.value * kTileRows);
    });
  }
}

// Asked in a function, not at load time: this file's code must not run before dispatch.cpp has seen the CPU.
bool has_i8mm() {
  static const bool has = getauxval(AT_HWCAP2) >> 13 & 1; // HWCAP2_I8MM; older headers have no name for it
  return has;
}

using Unpack = void (*)(const Matrix&, int64_t, int64_t, int8_t*);
constexpr Unpack kUnpack[2][7] = {
    {unpack_units<2, false>, unpack_units<3, false>, unpack_units<4, false>, unpack_units<5, false>, unpack_units<6, false>,
     unpack_units<7, false>, unpack_units<8, false>},
    {unpack_units<2, true>, unpack_units<3, true>, unpack_units<4, true>, unpack_units<5, true>, unpack_units<6, true>,
     unpack_units<7, true>, unpack_units<8, true>}};

void multiply_many(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  alignas(64) int8_t codes[kChunkBytes];
  const bool i8mm = has_i8mm();
  const Unpack unpack_to = kUnpack[i8mm][bits - kBaseBits];
  const int group = w.shape.group, units = group / 32;
  const int64_t groups = w.shape.groups(), most = kChunkBytes / (kTileRows * group);
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    float* out = y + tile * kTileRows;
    const int64_t rows = least(w.shape.rows - tile * kTileRows, kTileRows);
    for (int64_t g = 0; g < groups; g += most) { // sums go from chunk to chunk by way of y
      const int64_t block = tile * groups + g;
      const NeonChunk c{codes, w.affine + block * 2 * kTileRows, g, least(most, groups - g), group, half_of(bits) + kLess};
      unpack_to(w, block * units, c.count * units, codes);
      by_fours(x.m, [&](auto t, int64_t i) {
        constexpr int T = decltype(t)::value;
        float acc[4 * kTileRows] = {};
        for (int64_t k = 0; g && k < T; ++k)
          for (int64_t r = 0; r < rows; ++r) acc[k * kTileRows + r] = out[(i + k) * ldy + r];
        i8mm ? neon_i8mm_chunk(c, x, groups, i, T, acc) : dot_chunk<T>(c, x, groups, i, acc);
        if (g + c.count == groups) return finish(w, tile, T, acc, y + i * ldy, ldy);
        for (int64_t k = 0; k < T; ++k)
          for (int64_t r = 0; r < rows; ++r) out[(i + k) * ldy + r] = acc[k * kTileRows + r];
      });
    }
  }
}

using Few = void (*)(const Matrix&, const Activations&, int64_t, int64_t, float*, int64_t);
template <int BITS> constexpr Few few(int64_t m) {
  constexpr Few by_tokens[kFewTokens] = {BITS == 2 ? multiply_fields : multiply_few<BITS, 1>, multiply_few<BITS, 2>,
                                         multiply_few<BITS, 3>, multiply_few<BITS, 4>};
  return by_tokens[m - 1];
}

} // namespace

void neon::matmul(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  if (x.m > kFewTokens) return multiply_many(w, bits, x, tile0, tile1, y, ldy);
  if (x.m < 1) return;
  constexpr Few (*by_width[])(int64_t) = {few<2>, few<3>, few<4>, few<5>, few<6>, few<7>, few<8>};
  by_width[bits - kBaseBits](x.m)(w, x, tile0, tile1, y, ldy);
}

const char* neon::variant(int bits, int64_t m) {
  if (m > kFewTokens) return has_i8mm() ? "i8mm 2x2 matrices, codes unpacked to L1" : "dot, codes unpacked to L1";
  return bits == 2 && m == 1 ? "dot, two-bit fields in place" : "dot, codes in registers";
}

} // namespace d2moe
