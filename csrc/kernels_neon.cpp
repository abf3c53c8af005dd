// AArch64 with the dot product instructions (FEAT_DotProd). A quarter of a register of layout.h is 4 rows x 4 columns, one
// int32 lane a row. sdot wants signed bytes, so codes are used less 128; the zero's offset makes that good at no cost:
// sum (code - 128) q + (half + 128 - Z) sum q is the same exact number. Compiled for such CPUs, called only on
// them (dispatch.cpp).
#include "kernels_neon.h"

#include <arm_neon.h>
#include <initializer_list>
#include <sys/auxv.h>
#include <utility>

namespace d2moe {
namespace {

constexpr int kFewTokens = 4;             // up to here codes are used straight from registers
constexpr int64_t kChunkBytes = 16 << 10; // above, unpacked once to so much of L1, for all tokens
constexpr float kLess = 128.0f;           // what codes are lowered by

template <int N> struct Index { static constexpr int value = N; };
template <class F, int... I> inline __attribute__((always_inline)) void each(F&& f, std::integer_sequence<int, I...>) {
  (f(Index<I>{}), ...);
}
// Loops whose index is a constant; GCC keeps arrays in registers only where no loop is left.
template <int N, class F> inline __attribute__((always_inline)) void unrolled(F&& f) {
  each(f, std::make_integer_sequence<int, N>{});
}
// f(Index<T>, i) for items [i, i + T) of n: fours, then what is left.
template <class F> inline __attribute__((always_inline)) void by_fours(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) f(Index<4>{}, i);
  if (n - i == 3) f(Index<3>{}, i);
  else if (n - i == 2) f(Index<2>{}, i);
  else if (n - i == 1) f(Index<1>{}, i);
}
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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

void matmul(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  if (x.m > kFewTokens) return multiply_many(w, bits, x, tile0, tile1, y, ldy);
  if (x.m < 1) return;
  constexpr Few (*by_width[])(int64_t) = {few<2>, few<3>, few<4>, few<5>, few<6>, few<7>, few<8>};
  by_width[bits - kBaseBits](x.m)(w, x, tile0, tile1, y, ldy);
}

const char* variant(int bits, int64_t m) {
  if (m > kFewTokens) return has_i8mm() ? "i8mm 2x2 matrices, codes unpacked to L1" : "dot, codes unpacked to L1";
  return bits == 2 && m == 1 ? "dot, two-bit fields in place" : "dot, codes in registers";
}

// ---- activations -----------------------------------------------------------------------------------------------------

void quantize(const float* x, int64_t cols, int group, int8_t* q, float* scale, int32_t* sum) {
  const int64_t groups = (cols + group - 1) / group;
  for (int64_t g = 0; g < groups; ++g, q += group) {
    float padded[256];
    const float* in = x + g * group;
    if (const int64_t n = cols - g * group; n < group) {
      for (int64_t i = 0; i < group; ++i) padded[i] = i < n ? in[i] : 0.0f;
      in = padded;
    }
    float32x4_t top = vdupq_n_f32(0.0f);
    for (int i = 0; i < group; i += 4) top = vmaxnmq_f32(top, vabsq_f32(vld1q_f32(in + i))); // as fmax, NaN aside
    float largest = vmaxnmvq_f32(top);
    if (!(largest > 0x1p-100f)) largest = 0.0f;
    const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    int32x4_t total = vdupq_n_s32(0);
    for (int i = 0; i < group; i += 8) {
      const int32x4_t a = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(in + i), inverse)); // rounds half to even
      const int32x4_t b = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(in + i + 4), inverse));
      total = vaddq_s32(total, vaddq_s32(a, b));
      vst1_s8(q + i, vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))));
    }
    scale[g] = largest / 127.0f;
    sum[g] = vaddvq_s32(total);
  }
}

// ---- attention -------------------------------------------------------------------------------------------------------

inline float32x4_t halves(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

void scores_f16(const uint16_t* keys, int64_t tiles, int64_t head_dim, ConstRows q, int64_t n, Rows scores) {
  for (int64_t tile = 0; tile < tiles; ++tile, keys += head_dim * kKeyTile)
    by_fours(n, [&](auto t, int64_t i0) {
      constexpr int T = decltype(t)::value;
      float32x4_t acc[T][4];
      unrolled<4 * T>([&](auto k) { acc[k.value / 4][k.value % 4] = vdupq_n_f32(0.0f); });
      const float* x = q.data + i0 * q.stride;
      for (int64_t d = 0; d < head_dim; ++d) {
        float32x4_t key[4];
        unrolled<4>([&](auto r) { key[r.value] = halves(keys + d * kKeyTile + 4 * r.value); });
        unrolled<4 * T>([&](auto k) {
          constexpr int I = decltype(k)::value / 4, R = decltype(k)::value % 4;
          acc[I][R] = vaddq_f32(acc[I][R], vmulq_n_f32(key[R], x[I * q.stride + d]));
        });
      }
      unrolled<4 * T>([&](auto k) {
        vst1q_f32(scores.data + (i0 + k.value / 4) * scores.stride + tile * kKeyTile + k.value % 4 * 4, acc[k.value / 4][k.value % 4]);
      });
    });
}

void scores_q8(const uint8_t* keys, const float* key_scale, int64_t tiles, int64_t head_dim, const int8_t* q,
               int64_t q_stride, int64_t n, Rows scores) {
  const auto four = [](const int8_t* p) { // four elements of a query in every lane
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(v));
  };
  for (int64_t tile = 0; tile < tiles; ++tile, keys += head_dim * kKeyTile)
    by_fours(n, [&](auto t, int64_t i0) {
      constexpr int T = decltype(t)::value;
      int32x4_t dot[T][4];
      unrolled<4 * T>([&](auto k) { dot[k.value / 4][k.value % 4] = vdupq_n_s32(0); });
      for (int64_t d = 0; d < head_dim; d += 4) {
        int8x16_t key[4]; // code + 128 with its top bit flipped is the code
        unrolled<4>([&](auto r) {
          key[r.value] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(keys + d * kKeyTile + 16 * r.value), vdupq_n_u8(128)));
        });
        unrolled<T>([&](auto i) {
          const int8x16_t v = four(q + (i0 + i.value) * q_stride + d);
          unrolled<4>([&](auto r) { dot[i.value][r.value] = vdotq_s32(dot[i.value][r.value], key[r.value], v); });
        });
      }
      unrolled<4 * T>([&](auto k) {
        constexpr int I = decltype(k)::value / 4, R = decltype(k)::value % 4;
        vst1q_f32(scores.data + (i0 + I) * scores.stride + tile * kKeyTile + 4 * R,
                  vmulq_f32(vcvtq_f32_s32(dot[I][R]), vld1q_f32(key_scale + tile * kKeyTile + 4 * R)));
      });
    });
}

inline void eight(const uint16_t* p, float32x4_t (&v)[2]) {
  const float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(p));
  v[0] = vcvt_f32_f16(vget_low_f16(h));
  v[1] = vcvt_high_f32_f16(h);
}
inline void eight(const int8_t* p, float32x4_t (&v)[2]) {
  const int16x8_t wide = vmovl_s8(vld1_s8(p));
  v[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  v[1] = vcvtq_f32_s32(vmovl_high_s16(wide));
}
inline float one(uint16_t h) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0); }
inline float one(int8_t v) { return float(v); }

// weight(i, j) is what value j counts for query i; outputs stay in registers over all values, 16 columns at a time.
template <class V, class W> inline __attribute__((always_inline)) void mix(const V* values, int64_t count, int64_t head_dim, W&& weight, int64_t n, Rows out) {
  const int64_t whole = head_dim & -16;
  by_fours(n, [&](auto t, int64_t i0) {
    constexpr int T = decltype(t)::value;
    for (int64_t d = 0; d < whole; d += 16) {
      float32x4_t acc[T][4];
      unrolled<4 * T>([&](auto k) { acc[k.value / 4][k.value % 4] = vld1q_f32(out.data + (i0 + k.value / 4) * out.stride + d + k.value % 4 * 4); });
      for (int64_t j = 0; j < count; ++j) {
        float32x4_t v[2][2];
        eight(values + j * head_dim + d, v[0]);
        eight(values + j * head_dim + d + 8, v[1]);
        unrolled<T>([&](auto i) {
          const float w = weight(i0 + i.value, j);
          unrolled<4>([&](auto r) { acc[i.value][r.value] = vaddq_f32(acc[i.value][r.value], vmulq_n_f32(v[r.value / 2][r.value % 2], w)); });
        });
      }
      unrolled<4 * T>([&](auto k) { vst1q_f32(out.data + (i0 + k.value / 4) * out.stride + d + k.value % 4 * 4, acc[k.value / 4][k.value % 4]); });
    }
    for (int64_t i = i0; whole < head_dim && i < i0 + T; ++i) // heads of other sizes are rare
      for (int64_t j = 0; j < count; ++j)
        for (int64_t d = whole; d < head_dim; ++d) out.data[i * out.stride + d] += weight(i, j) * one(values[j * head_dim + d]);
  });
}

void mix_f16(const uint16_t* values, int64_t count, int64_t head_dim, ConstRows p, int64_t n, Rows out) {
  mix(values, count, head_dim, [&](int64_t i, int64_t j) { return p.data[i * p.stride + j]; }, n, out);
}

void mix_q8(const int8_t* values, const float* value_scale, int64_t count, int64_t head_dim, ConstRows p, int64_t n,
            Rows out) {
  mix(values, count, head_dim, [&](int64_t i, int64_t j) { return p.data[i * p.stride + j] * value_scale[j]; }, n, out);
}

// ---- the small slots: as in the scalar table, operation by operation -------------------------------------------------

// The last n < N elements, with zeros after them.
template <class T, int N> struct Tail {
  T v[N] = {};
  Tail() = default;
  Tail(const T* p, int64_t n) { for (int64_t i = 0; i < n; ++i) v[i] = p[i]; }
  void put(T* p, int64_t n) const { for (int64_t i = 0; i < n; ++i) p[i] = v[i]; }
};

inline float add_lanes(float32x4_t v) { // half to half
  const float32x2_t two = vadd_f32(vget_low_f32(v), vget_high_f32(v));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

float dot_f32(const float* a, const float* b, int64_t n) {
  float32x4_t acc[8];
  unrolled<8>([&](auto l) { acc[l.value] = vdupq_n_f32(0.0f); });
  const auto add = [&](const float* x, const float* y) {
    unrolled<8>([&](auto l) { acc[l.value] = vaddq_f32(acc[l.value], vmulq_f32(vld1q_f32(x + 4 * l.value), vld1q_f32(y + 4 * l.value))); });
  };
  const int64_t whole = n & -32;
  for (int64_t i = 0; i < whole; i += 32) add(a + i, b + i);
  if (whole < n) add(Tail<float, 32>(a + whole, n - whole).v, Tail<float, 32>(b + whole, n - whole).v);
  unrolled<4>([&](auto l) { acc[l.value] = vaddq_f32(acc[l.value], acc[l.value + 4]); });
  return add_lanes(vaddq_f32(vaddq_f32(acc[0], acc[2]), vaddq_f32(acc[1], acc[3])));
}

float sum_squares(const float* x, int64_t n) { return dot_f32(x, x, n); }

inline float32x4_t power_of_two(int32x4_t n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }

inline float32x4_t exponential(float32x4_t x) {
  x = vmaxq_f32(vminq_f32(x, vdupq_n_f32(150.0f)), vdupq_n_f32(-150.0f)); // these let NaN through
  const float32x4_t n = vrndnq_f32(vmulq_f32(x, vdupq_n_f32(1.44269504f)));
  float32x4_t r = vsubq_f32(x, vmulq_f32(n, vdupq_n_f32(0.693359375f)));
  r = vsubq_f32(r, vmulq_f32(n, vdupq_n_f32(-2.12194440e-4f)));
  float32x4_t p = vdupq_n_f32(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = vaddq_f32(vmulq_f32(p, r), vdupq_n_f32(c));
  const int32x4_t whole = vcvtq_s32_f32(n), part = vshrq_n_s32(whole, 1);
  return vmulq_f32(vmulq_f32(p, power_of_two(part)), power_of_two(vsubq_s32(whole, part)));
}

float exp_sum(float* x, float offset, int64_t n) {
  const float32x4_t o = vdupq_n_f32(offset);
  float32x4_t sum[4]; // 16 lanes
  unrolled<4>([&](auto l) { sum[l.value] = vdupq_n_f32(0.0f); });
  const int64_t whole = n & -16;
  for (int64_t i = 0; i < whole; i += 16)
    unrolled<4>([&](auto l) {
      const float32x4_t e = exponential(vsubq_f32(vld1q_f32(x + i + 4 * l.value), o));
      vst1q_f32(x + i + 4 * l.value, e);
      sum[l.value] = vaddq_f32(sum[l.value], e);
    });
  if (whole < n) {
    Tail<float, 16> tail(x + whole, n - whole);
    unrolled<4>([&](auto l) { vst1q_f32(tail.v + 4 * l.value, exponential(vsubq_f32(vld1q_f32(tail.v + 4 * l.value), o))); });
    tail.put(x + whole, n - whole);
    const Tail<float, 16> last(x + whole, n - whole); // only what belongs to the sum
    unrolled<4>([&](auto l) { sum[l.value] = vaddq_f32(sum[l.value], vld1q_f32(last.v + 4 * l.value)); });
  }
  return add_lanes(vaddq_f32(vaddq_f32(sum[0], sum[2]), vaddq_f32(sum[1], sum[3])));
}

// step(i, x) of whole fours and of what is left, which goes by way of zero-padded copies.
template <class X, class Y, class F> inline void map(const X* x, Y* y, int64_t n, F&& step) {
  const int64_t whole = n & -4;
  for (int64_t i = 0; i < whole; i += 4) step(x + i, y + i);
  if (whole == n) return;
  const Tail<X, 4> in(x + whole, n - whole);
  Tail<Y, 4> out(y + whole, n - whole);
  step(in.v, out.v);
  out.put(y + whole, n - whole);
}

void silu_mul(float* gate, const float* up, int64_t n) {
  map(up, gate, n, [](const float* u, float* gate4) {
    const float32x4_t g = vld1q_f32(gate4);
    const float32x4_t silu = vdivq_f32(g, vaddq_f32(vdupq_n_f32(1.0f), exponential(vsubq_f32(vdupq_n_f32(0.0f), g))));
    vst1q_f32(gate4, vmulq_f32(silu, vld1q_f32(u)));
  });
}

void to_f16(const float* x, uint16_t* y, int64_t n) {
  map(x, y, n, [](const float* a, uint16_t* b) { vst1_u16(b, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(a)))); });
}

void to_f32(const uint16_t* x, float* y, int64_t n) {
  map(x, y, n, [](const uint16_t* a, float* b) { vst1q_f32(b, halves(a)); });
}

uint64_t read_bytes(const uint8_t* p, int64_t n) {
  uint8x16_t acc[4];
  unrolled<4>([&](auto l) { acc[l.value] = vdupq_n_u8(0); });
  for (int64_t i = 0; i < n; i += 64)
    unrolled<4>([&](auto l) { acc[l.value] = veorq_u8(acc[l.value], vld1q_u8(p + i + 16 * l.value)); });
  const uint64x2_t all = vreinterpretq_u64_u8(veorq_u8(veorq_u8(acc[0], acc[1]), veorq_u8(acc[2], acc[3])));
  return vgetq_lane_u64(all, 0) ^ vgetq_lane_u64(all, 1);
}

} // namespace

const KernelTable kNeonTable = {"neon", quantize, matmul,      variant, dot_f32,  scores_f16, scores_q8, mix_f16,
                                mix_q8, sum_squares, exp_sum, silu_mul, to_f16,     to_f32,    read_bytes};

} // namespace d2moe
