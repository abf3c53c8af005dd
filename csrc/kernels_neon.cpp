// AArch64 with the dot product instructions (FEAT_DotProd): the table and all of it but the nested products. Compiled for such
// CPUs, called only on them (dispatch.cpp).
#include "kernels_neon.h"

#include <initializer_list>

namespace d2moe {
namespace {

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
          acc[I][R] = vfmaq_n_f32(acc[I][R], key[R], x[I * q.stride + d]);
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
          unrolled<4>([&](auto r) { acc[i.value][r.value] = vfmaq_n_f32(acc[i.value][r.value], v[r.value / 2][r.value % 2], w); });
        });
      }
      unrolled<4 * T>([&](auto k) { vst1q_f32(out.data + (i0 + k.value / 4) * out.stride + d + k.value % 4 * 4, acc[k.value / 4][k.value % 4]); });
    }
    for (int64_t i = i0; whole < head_dim && i < i0 + T; ++i) // heads of other sizes are rare
      for (int64_t j = 0; j < count; ++j)
        for (int64_t d = whole; d < head_dim; ++d) {
          float& y = out.data[i * out.stride + d];
          y = __builtin_fmaf(weight(i, j), one(values[j * head_dim + d]), y);
        }
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

const KernelTable kNeonTable = {"neon", quantize, neon::matmul, neon::variant, dot_f32, scores_f16, scores_q8, mix_f16,
                                mix_q8, sum_squares, exp_sum, silu_mul, to_f16, to_f32, read_bytes};

} // namespace d2moe
