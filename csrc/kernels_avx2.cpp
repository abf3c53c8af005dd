// AVX2 with FMA and F16C: the table and all of it but the nested products. Every operation is the scalar table's, in its order.
#include "kernels_avx2.h"

namespace d2moe {
namespace {

inline float add_lanes(__m256 v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}

// The last n < 8 elements, with zeros after them.
template <class T> struct Tail {
  alignas(32) T v[8] = {};
  Tail(const T* p, int64_t n) { for (int64_t i = 0; i < n; ++i) v[i] = p[i]; }
  void put(T* p, int64_t n) const { for (int64_t i = 0; i < n; ++i) p[i] = v[i]; }
};

constexpr int64_t kAheadBytes = 2048; // software prefetch; hardware prefetchers stop at 4 KiB pages

void quantize(const float* x, int64_t cols, int group, int8_t* q, float* scale, int32_t* sum) {
  const int64_t groups = (cols + group - 1) / group;
  const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  for (int64_t g = 0; g < groups; ++g, q += group) {
    alignas(32) float padded[256] = {};
    const float* in = x + g * group;
    if (const int64_t n = cols - g * group; n < group) {
      for (int64_t i = 0; i < n; ++i) padded[i] = in[i];
      in = padded;
    }
    __m256 top = _mm256_setzero_ps(); // max(x, top) keeps top where x is not a number, as fmax does
    for (int i = 0; i < group; i += 8) top = _mm256_max_ps(_mm256_and_ps(_mm256_loadu_ps(in + i), no_sign), top);
    __m128 four_tops = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
    four_tops = _mm_max_ps(four_tops, _mm_movehl_ps(four_tops, four_tops));
    float largest = _mm_cvtss_f32(_mm_max_ss(four_tops, _mm_shuffle_ps(four_tops, four_tops, 1)));
    if (!(largest > 0x1p-100f)) largest = 0.0f;
    const __m256 inverse = _mm256_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
    __m256i total = _mm256_setzero_si256();
    for (int i = 0; i < group; i += 8) {
      const __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(in + i), inverse)); // rounds half to even
      total = _mm256_add_epi32(total, code);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(q + i), _mm_packs_epi16(words, words));
    }
    alignas(32) int32_t lane[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), total);
    scale[g] = largest / 127.0f;
    sum[g] = lane[0] + lane[1] + lane[2] + lane[3] + lane[4] + lane[5] + lane[6] + lane[7];
  }
}

// In 32 lanes, multiply and add apart, lanes half to half.
float dot_f32(const float* a, const float* b, int64_t n) {
  __m256 acc[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  const auto add = [&](const float* x, const float* y) INLINE {
    for (int l = 0; l < 4; ++l) acc[l] = _mm256_add_ps(acc[l], _mm256_mul_ps(_mm256_loadu_ps(x + 8 * l), _mm256_loadu_ps(y + 8 * l)));
  };
  const int64_t whole = n & -32;
  for (int64_t i = 0; i < whole; i += 32) {
    prefetch(reinterpret_cast<const uint8_t*>(a + i) + kAheadBytes); // a router's weights follow each other
    prefetch(reinterpret_cast<const uint8_t*>(a + i) + kAheadBytes + 64);
    add(a + i, b + i);
  }
  if (whole < n) {
    alignas(32) float x[32] = {}, y[32] = {};
    for (int64_t i = whole; i < n; ++i) x[i - whole] = a[i], y[i - whole] = b[i];
    add(x, y);
  }
  return add_lanes(_mm256_add_ps(_mm256_add_ps(acc[0], acc[2]), _mm256_add_ps(acc[1], acc[3])));
}

float sum_squares(const float* x, int64_t n) { return dot_f32(x, x, n); }

inline __m256 power_of_two(__m256i n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }

// As in the scalar table, operation by operation.
inline __m256 exponential(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-150.0f), _mm256_min_ps(_mm256_set1_ps(150.0f), x)); // this order lets NaN through
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_sub_ps(x, _mm256_mul_ps(n, _mm256_set1_ps(0.693359375f)));
  r = _mm256_sub_ps(r, _mm256_mul_ps(n, _mm256_set1_ps(-2.12194440e-4f)));
  __m256 p = _mm256_set1_ps(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm256_add_ps(_mm256_mul_ps(p, r), _mm256_set1_ps(c));
  const __m256i whole = _mm256_cvtps_epi32(n), part = _mm256_srai_epi32(whole, 1);
  return _mm256_mul_ps(_mm256_mul_ps(p, power_of_two(part)), power_of_two(_mm256_sub_epi32(whole, part)));
}

float exp_sum(float* x, float offset, int64_t n) {
  const __m256 o = _mm256_set1_ps(offset);
  __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}; // 16 lanes
  const int64_t whole = n & -8;
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256 e = exponential(_mm256_sub_ps(_mm256_loadu_ps(x + i), o));
    _mm256_storeu_ps(x + i, e);
    sum[i / 8 % 2] = _mm256_add_ps(sum[i / 8 % 2], e);
  }
  Tail<float> xt(x + whole, n - whole);
  _mm256_store_ps(xt.v, exponential(_mm256_sub_ps(_mm256_load_ps(xt.v), o)));
  xt.put(x + whole, n - whole);
  const Tail<float> last(x + whole, n - whole); // only what belongs to the sum
  sum[whole / 8 % 2] = _mm256_add_ps(sum[whole / 8 % 2], _mm256_load_ps(last.v));
  return add_lanes(_mm256_add_ps(sum[0], sum[1]));
}

inline __m256 silu(__m256 g) {
  return _mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.0f), exponential(_mm256_sub_ps(_mm256_setzero_ps(), g))));
}

void silu_mul(float* gate, const float* up, int64_t n) {
  const int64_t whole = n & -8;
  for (int64_t i = 0; i < whole; i += 8) _mm256_storeu_ps(gate + i, _mm256_mul_ps(silu(_mm256_loadu_ps(gate + i)), _mm256_loadu_ps(up + i)));
  Tail<float> gt(gate + whole, n - whole);
  const Tail<float> ut(up + whole, n - whole);
  _mm256_store_ps(gt.v, _mm256_mul_ps(silu(_mm256_load_ps(gt.v)), _mm256_load_ps(ut.v)));
  gt.put(gate + whole, n - whole);
}

inline void store_halves(uint16_t* y, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

void to_f16(const float* x, uint16_t* y, int64_t n) {
  const int64_t whole = n & -8;
  for (int64_t i = 0; i < whole; i += 8) store_halves(y + i, _mm256_loadu_ps(x + i));
  const Tail<float> xt(x + whole, n - whole);
  Tail<uint16_t> yt(nullptr, 0);
  store_halves(yt.v, _mm256_load_ps(xt.v));
  yt.put(y + whole, n - whole);
}

void to_f32(const uint16_t* x, float* y, int64_t n) {
  const int64_t whole = n & -8;
  for (int64_t i = 0; i < whole; i += 8) _mm256_storeu_ps(y + i, halves(x + i));
  const Tail<uint16_t> xt(x + whole, n - whole);
  Tail<float> yt(nullptr, 0);
  _mm256_store_ps(yt.v, halves(xt.v));
  yt.put(y + whole, n - whole);
}


uint64_t read_bytes(const uint8_t* p, int64_t n) {
  __m256i acc[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  int64_t i = 0;
  for (; i + 128 <= n; i += 128) {
    prefetch(p + i + kAheadBytes);
    prefetch(p + i + kAheadBytes + 64);
    for (int l = 0; l < 4; ++l) acc[l] = _mm256_xor_si256(acc[l], load(p + i + 32 * l));
  }
  for (; i < n; i += 32) acc[0] = _mm256_xor_si256(acc[0], load(p + i));
  alignas(32) uint64_t lane[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), _mm256_xor_si256(_mm256_xor_si256(acc[0], acc[1]), _mm256_xor_si256(acc[2], acc[3])));
  return lane[0] ^ lane[1] ^ lane[2] ^ lane[3];
}

// ---- attention ---------------------------------------------------------------------------------------------------

constexpr int64_t kValueRows = 64; // values that meet all queries before the next ones are read

// take(Index<T>, i) for queries i..i+T-1 of n, T at most 4: more accumulators than that do not fit the registers.
template <class F> inline INLINE void by_queries(int64_t n, F&& take) {
  int64_t i = 0;
  for (; n - i >= 4; i += 4) take(Index<4>{}, i);
  if (n - i == 3) take(Index<3>{}, i);
  if (n - i == 2) take(Index<2>{}, i);
  if (n - i == 1) take(Index<1>{}, i);
}

// U tiles of keys and T queries at a time, so that enough sums are in flight.
template <int T, int U> inline void score_halves(const uint16_t* keys, int64_t head_dim, ConstRows q, Rows scores) {
  __m256 acc[T * U * 2];
  unrolled<T * U * 2>([&](auto k) INLINE { acc[k.value] = _mm256_setzero_ps(); });
  for (int64_t d = 0; d < head_dim; ++d) {
    __m256 key[U * 2];
    unrolled<U * 2>([&](auto k) INLINE { key[k.value] = halves(keys + (k.value / 2 * head_dim + d) * kKeyTile + k.value % 2 * 8); });
    unrolled<T>([&](auto i) INLINE {
      constexpr int I = decltype(i)::value;
      const __m256 v = _mm256_set1_ps(q.data[I * q.stride + d]);
      unrolled<U * 2>([&](auto k) INLINE {
        constexpr int A = I * U * 2 + decltype(k)::value;
        acc[A] = _mm256_fmadd_ps(v, key[k.value], acc[A]);
      });
    });
  }
  unrolled<T * U * 2>([&](auto k) INLINE {
    constexpr int I = decltype(k)::value / (U * 2), K = decltype(k)::value % (U * 2);
    _mm256_storeu_ps(scores.data + I * scores.stride + 8 * K, acc[k.value]);
  });
}

void scores_f16(const uint16_t* keys, int64_t tiles, int64_t head_dim, ConstRows q, int64_t n, Rows scores) {
  for (int64_t t = 0; t < tiles;) {
    const int64_t two = tiles - t >= 2 ? 2 : 1;
    by_queries(n, [&](auto queries, int64_t i) {
      constexpr int T = decltype(queries)::value;
      const ConstRows from{q.data + i * q.stride, q.stride};
      for (int64_t u = 0; u < two;) {
        const Rows to{scores.data + i * scores.stride + (t + u) * kKeyTile, scores.stride};
        const uint16_t* tile = keys + (t + u) * head_dim * kKeyTile;
        if (T <= 2 && two == 2) score_halves<T, T <= 2 ? 2 : 1>(tile, head_dim, from, to), u += 2;
        else score_halves<T, 1>(tile, head_dim, from, to), ++u;
      }
    });
    t += two;
  }
}

// Codes are split into nibbles: with 16 * upper + lower no sum of 32 columns saturates. `total` is the query's own sum,
// times 128 too much in the products.
template <int T> inline void score_codes(const uint8_t* keys, const float* key_scale, int64_t head_dim, const int8_t* q,
                                         int64_t q_stride, const int32_t* total, Rows scores) {
  const __m256i low_mask = _mm256_set1_epi8(15);
  for (int side = 0; side < 2; ++side) {
    __m256i dot[T], top[T], low[T];
    unrolled<T>([&](auto i) INLINE { dot[i.value] = _mm256_set1_epi32(-128 * total[i.value]); });
    const auto add = [&](int64_t d) INLINE {
      const __m256i key = load(keys + d * kKeyTile + 32 * side);
      const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(key, 4), low_mask), lower = _mm256_and_si256(key, low_mask);
      unrolled<T>([&](auto i) INLINE {
        constexpr int I = decltype(i)::value;
        const __m256i v = four(q + I * q_stride + d);
        add16(top[I], _mm256_maddubs_epi16(upper, v));
        add16(low[I], _mm256_maddubs_epi16(lower, v));
      });
    };
    for (int64_t d = 0; d < head_dim; d += 32) {
      unrolled<T>([&](auto i) INLINE { top[i.value] = low[i.value] = _mm256_setzero_si256(); });
      if (d + 32 <= head_dim) unrolled<8>([&](auto f) INLINE { add(d + 4 * f.value); });
      else for (int64_t e = d; e < head_dim; e += 4) add(e);
      unrolled<T>([&](auto i) INLINE {
        constexpr int I = decltype(i)::value;
        dot[I] = _mm256_add_epi32(dot[I], _mm256_madd_epi16(top[I], _mm256_set1_epi16(16)));
        dot[I] = _mm256_add_epi32(dot[I], _mm256_madd_epi16(low[I], _mm256_set1_epi16(1)));
      });
    }
    const __m256 scale = _mm256_loadu_ps(key_scale + 8 * side);
    unrolled<T>([&](auto i) INLINE {
      _mm256_storeu_ps(scores.data + i.value * scores.stride + 8 * side, _mm256_mul_ps(_mm256_cvtepi32_ps(dot[i.value]), scale));
    });
  }
}

void scores_q8(const uint8_t* keys, const float* key_scale, int64_t tiles, int64_t head_dim, const int8_t* q,
               int64_t q_stride, int64_t n, Rows scores) {
  int32_t total[kQueries] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < head_dim; ++d) total[i] += q[i * q_stride + d];
  for (int64_t t = 0; t < tiles; ++t)
    by_queries(n, [&](auto queries, int64_t i) {
      score_codes<decltype(queries)::value>(keys + t * head_dim * kKeyTile, key_scale + t * kKeyTile, head_dim, q + i * q_stride, q_stride,
                                            total + i, {scores.data + i * scores.stride + t * kKeyTile, scores.stride});
    });
}

inline __m256 floats(const uint16_t* p) { return halves(p); }
inline __m256 floats(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline float one_float(const uint16_t* p) { return _cvtsh_ss(*p); }
inline float one_float(const int8_t* p) { return float(*p); }

// Adds `count` values to R registers of the sums of T queries. `ahead`: the distance of what is prefetched.
template <int T, int R, class V>
inline void mix_registers(const V* values, int64_t count, int64_t head_dim, const float (*p)[kValueRows], Rows out, int64_t ahead) {
  __m256 acc[T * R];
  unrolled<T * R>([&](auto k) INLINE { acc[k.value] = _mm256_loadu_ps(out.data + k.value / R * out.stride + k.value % R * 8); });
  for (int64_t j = 0; j < count; ++j, values += head_dim) {
    prefetch(reinterpret_cast<const uint8_t*>(values + ahead));
    __m256 v[R];
    unrolled<R>([&](auto r) INLINE { v[r.value] = floats(values + 8 * r.value); });
    unrolled<T>([&](auto i) INLINE {
      const __m256 weight = _mm256_set1_ps(p[i.value][j]);
      unrolled<R>([&](auto r) INLINE {
        constexpr int A = decltype(i)::value * R + decltype(r)::value;
        acc[A] = _mm256_fmadd_ps(weight, v[r.value], acc[A]);
      });
    });
  }
  unrolled<T * R>([&](auto k) INLINE { _mm256_storeu_ps(out.data + k.value / R * out.stride + k.value % R * 8, acc[k.value]); });
}

// weights(i, j0, count, to) writes p[i][j0..j0+count), with the values' scales.
template <class V, class W> inline void mix(const V* values, int64_t count, int64_t head_dim, int64_t n, Rows out, W&& weights) {
  alignas(32) float p[kQueries][kValueRows];
  for (int64_t j0 = 0; j0 < count; j0 += kValueRows, values += kValueRows * head_dim) {
    const int64_t rows = least(kValueRows, count - j0);
    for (int64_t i = 0; i < n; ++i) weights(i, j0, rows, p[i]);
    by_queries(n, [&](auto queries, int64_t i) {
      constexpr int T = decltype(queries)::value, R = T == 1 ? 8 : T == 2 ? 4 : 2;
      const auto at = [&](int64_t d) { return Rows{out.data + i * out.stride + d, out.stride}; };
      int64_t d = 0;
      for (; d + 8 * R <= head_dim; d += 8 * R) mix_registers<T, R>(values + d, rows, head_dim, p + i, at(d), kValueRows * head_dim);
      for (; d + 8 <= head_dim; d += 8) mix_registers<T, 1>(values + d, rows, head_dim, p + i, at(d), kValueRows * head_dim);
      for (; d < head_dim; ++d)
        for (int k = 0; k < T; ++k)
          for (int64_t j = 0; j < rows; ++j) {
            float& y = at(d).data[k * out.stride];
            y = __builtin_fmaf(p[i + k][j], one_float(values + j * head_dim + d), y);
          }
    });
  }
}

void mix_f16(const uint16_t* values, int64_t count, int64_t head_dim, ConstRows p, int64_t n, Rows out) {
  mix(values, count, head_dim, n, out, [&](int64_t i, int64_t j0, int64_t rows, float* to) {
    for (int64_t j = 0; j < rows; ++j) to[j] = p.data[i * p.stride + j0 + j];
  });
}

void mix_q8(const int8_t* values, const float* value_scale, int64_t count, int64_t head_dim, ConstRows p, int64_t n, Rows out) {
  mix(values, count, head_dim, n, out, [&](int64_t i, int64_t j0, int64_t rows, float* to) {
    for (int64_t j = 0; j < rows; ++j) to[j] = p.data[i * p.stride + j0 + j] * value_scale[j0 + j];
  });
}

} // namespace

const KernelTable kAvx2Table = {"avx2",  quantize, avx2::matmul, avx2::variant, dot_f32,  scores_f16, scores_q8, mix_f16,
                                mix_q8,  sum_squares, exp_sum, silu_mul, to_f16,     to_f32,    read_bytes};

} // namespace d2moe
