// The inner loop of NEON products for many tokens where the CPU has int8 matrix instructions (FEAT_I8MM): smmla multiplies
// 2 rows x 8 columns of codes by 8 columns x 2 tokens. Compiled for such CPUs, called only on them.
#include "kernels_neon.h"

namespace d2moe {
namespace {

constexpr int kPairs = kTileRows / 2; // pairs of rows

// 16 columns of two tokens as two 8 x 2 matrices.
inline __attribute__((always_inline)) void load_pair(const int8_t* a, const int8_t* b, int8x16_t (&q)[2]) {
  const int64x2_t u = vreinterpretq_s64_s8(vld1q_s8(a)), v = vreinterpretq_s64_s8(vld1q_s8(b));
  q[0] = vreinterpretq_s8_s64(vzip1q_s64(u, v));
  q[1] = vreinterpretq_s8_s64(vzip2q_s64(u, v));
}

// The float part, exactly as at KernelTable::matmul, for four rows of one token.
inline __attribute__((always_inline)) void add_rows(float32x4_t step, float32x4_t zero, int32x4_t dot, float sum, float scale, float* acc) {
  const float32x4_t n = vaddq_f32(vcvtq_f32_s32(dot), vmulq_n_f32(zero, sum));
  vst1q_f32(acc, vaddq_f32(vld1q_f32(acc), vmulq_f32(vmulq_n_f32(n, scale), step)));
}
inline float32x4_t widened(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
}

// T pairs of tokens; the last token stands in for one past the end.
template <int T> void multiply(const NeonChunk& c, const Activations& x, int64_t groups, int64_t i0, int64_t n, float* acc) {
  const int64_t stride = groups * c.group;
  const int8_t *token[2 * T], *codes = c.codes;
  int64_t at[2 * T]; // of a token's sum and scale
  for (int k = 0; k < 2 * T; ++k) {
    const int64_t i = i0 + (k < n ? k : n - 1);
    token[k] = x.q + i * stride + c.group0 * c.group;
    at[k] = i * groups + c.group0;
  }
  for (int64_t g = 0; g < c.count; ++g) {
    int32x4_t dot[T][kPairs]; // lanes: row 0 token 0, row 0 token 1, row 1 token 0, row 1 token 1
    unrolled<T * kPairs>([&](auto k) { dot[k.value / kPairs][k.value % kPairs] = vdupq_n_s32(0); });
    for (int j = 0; j < c.group; j += 16, codes += 16 * kTileRows) {
      int8x16_t q[T][2];
      unrolled<T>([&](auto t) { load_pair(token[2 * t.value], token[2 * t.value + 1], q[t.value]); });
      unrolled<2 * T>([&](auto k) { token[k.value] += 16; });
      unrolled<2 * kPairs>([&](auto k) {
        constexpr int kColumns = decltype(k)::value / kPairs, kPair = decltype(k)::value % kPairs;
        const int8x16_t code = vld1q_s8(codes + 16 * decltype(k)::value);
        unrolled<T>([&](auto t) { dot[t.value][kPair] = vmmlaq_s32(dot[t.value][kPair], code, q[t.value][kColumns]); });
      });
    }
    const uint8_t* affine = c.affine + g * 2 * kTileRows;
    unrolled<4>([&](auto part) {
      constexpr int kPart = decltype(part)::value;
      const float32x4_t step = widened(affine + 4 * kPart);
      const float32x4_t zero = vsubq_f32(vdupq_n_f32(c.offset), widened(affine + kTileRows + 4 * kPart));
      unrolled<T>([&](auto t) {
        const int32x4_t a = dot[t.value][2 * kPart], b = dot[t.value][2 * kPart + 1];
        const int64_t first = at[2 * t.value] + g, second = at[2 * t.value + 1] + g;
        float* out = acc + 2 * t.value * kTileRows + 4 * kPart;
        add_rows(step, zero, vuzp1q_s32(a, b), float(x.sum[first]), x.scale[first], out);
        add_rows(step, zero, vuzp2q_s32(a, b), float(x.sum[second]), x.scale[second], out + kTileRows);
      });
    });
  }
}

} // namespace

void neon_i8mm_chunk(const NeonChunk& c, const Activations& x, int64_t groups, int64_t i0, int64_t n, float* acc) {
  n > 2 ? multiply<2>(c, x, groups, i0, n, acc) : multiply<1>(c, x, groups, i0, n, acc);
}

} // namespace d2moe
