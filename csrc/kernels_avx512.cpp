// The AVX-512 table but for its products (matmul_avx512.cpp).
#include "kernels_avx512.h"

namespace d2moe {
namespace {

// ---- attention -----------------------------------------------------------------------------------------------------

inline __mmask16 first(int64_t n) { return n >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << n) - 1); }
inline __m512 halves(const uint16_t* p, __mmask16 k) {
  return _mm512_cvtph_ps(k == 0xFFFF ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(k, p));
}
inline __m512 signed_bytes(const int8_t* p, __mmask16 k) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(k, p)));
}

// N queries and S tiles of keys in flight: their sums are independent, so that the latency of an addition does not bind. `left` tiles
// follow, which are asked for; what is not there would take as much of the bandwidth.
template <int N, int S>
void scores_f16_of(const uint16_t* keys, int64_t left, int64_t head_dim, const ConstRows& q, const Rows& out) {
  const int64_t ahead = least(left, int64_t(S)) * head_dim * kKeyTile;
  __m512 acc[N][S];
  unrolled<N * S>([&](auto k) { acc[k.value / S][k.value % S] = _mm512_setzero_ps(); });
  for (int64_t d = 0; d < head_dim; ++d) {
    __m512 key[S];
    unrolled<S>([&](auto s) { key[s.value] = halves(keys + (s.value * head_dim + d) * kKeyTile, 0xFFFF); });
    if (d % 2 == 0) // half a line each; the next tiles'
      unrolled<S>([&](auto s) __attribute__((always_inline)) {
        prefetch(reinterpret_cast<const uint8_t*>(keys + (s.value * head_dim + d) * kKeyTile + ahead));
      });
    unrolled<N>([&](auto i) __attribute__((always_inline)) {
      constexpr int I = decltype(i)::value;
      const __m512 x = _mm512_set1_ps(q.data[I * q.stride + d]);
      unrolled<S>([&](auto s) { acc[I][s.value] = _mm512_fmadd_ps(x, key[s.value], acc[I][s.value]); });
    });
  }
  unrolled<N * S>([&](auto k) { _mm512_storeu_ps(out.data + k.value / S * out.stride + k.value % S * kKeyTile, acc[k.value / S][k.value % S]); });
}

template <int N, int S>
void scores_q8_of(const uint8_t* keys, int64_t left, const float* key_scale, int64_t head_dim, const int8_t* q, int64_t q_stride,
                  const Rows& out) {
  const int64_t ahead = least(left, int64_t(S)) * head_dim * kKeyTile;
  __m512i dot[N][S];
  unrolled<N>([&](auto i) __attribute__((always_inline)) {
    constexpr int I = decltype(i)::value;
    int32_t sum = 0; // codes are 128 too large
    for (int64_t d = 0; d < head_dim; ++d) sum += q[I * q_stride + d];
    unrolled<S>([&](auto s) { dot[I][s.value] = _mm512_set1_epi32(-128 * sum); });
  });
  for (int64_t d = 0; d < head_dim; d += 4) {
    __m512i key[S];
    unrolled<S>([&](auto s) { key[s.value] = load(keys + (s.value * head_dim + d) * kKeyTile); });
    unrolled<S>([&](auto s) __attribute__((always_inline)) { prefetch(keys + (s.value * head_dim + d) * kKeyTile + ahead); });
    unrolled<N>([&](auto i) __attribute__((always_inline)) {
      const __m512i x = four(q + decltype(i)::value * q_stride + d);
      unrolled<S>([&](auto s) __attribute__((always_inline)) { add_products(dot[decltype(i)::value][s.value], key[s.value], x); });
    });
  }
  unrolled<N * S>([&](auto k) {
    constexpr int I = decltype(k)::value / S, A = decltype(k)::value % S;
    const __m512 scale = _mm512_loadu_ps(key_scale + A * kKeyTile);
    _mm512_storeu_ps(out.data + I * out.stride + A * kKeyTile, _mm512_mul_ps(_mm512_cvtepi32_ps(dot[I][A]), scale));
  });
}

// Calls f(queries, tiles, first query, first tile) with constants for the two counts until all is covered.
template <class F> inline void cut_scores(int64_t n, int64_t tiles, F&& f) {
  int64_t i = 0;
  const auto take = [&](auto queries, auto side) {
    constexpr int N = decltype(queries)::value, S = decltype(side)::value;
    for (; i + N <= n; i += N) {
      int64_t t = 0;
      for (; t + S <= tiles; t += S) f(queries, side, i, t);
      for (; t + 2 <= tiles; t += 2) f(queries, Index<2>{}, i, t);
      for (; t < tiles; ++t) f(queries, Index<1>{}, i, t);
    }
  };
  take(Index<8>{}, Index<2>{});
  take(Index<4>{}, Index<4>{});
  take(Index<2>{}, Index<4>{});
  take(Index<1>{}, Index<4>{});
}

void scores_f16(const uint16_t* keys, int64_t tiles, int64_t head_dim, ConstRows q, int64_t n, Rows scores) {
  cut_scores(n, tiles, [&](auto queries, auto side, int64_t i, int64_t t) {
    scores_f16_of<decltype(queries)::value, decltype(side)::value>(
        keys + t * head_dim * kKeyTile, tiles - t - decltype(side)::value, head_dim, {q.data + i * q.stride, q.stride}, {scores.data + i * scores.stride + t * kKeyTile, scores.stride});
  });
}

void scores_q8(const uint8_t* keys, const float* key_scale, int64_t tiles, int64_t head_dim, const int8_t* q,
               int64_t q_stride, int64_t n, Rows scores) {
  cut_scores(n, tiles, [&](auto queries, auto side, int64_t i, int64_t t) {
    scores_q8_of<decltype(queries)::value, decltype(side)::value>(
        keys + t * head_dim * kKeyTile, tiles - t - decltype(side)::value, key_scale + t * kKeyTile, head_dim, q + i * q_stride, q_stride,
        {scores.data + i * scores.stride + t * kKeyTile, scores.stride});
  });
}

constexpr int64_t kRowsAhead = 16; // values asked for before their turn: parts of rows are too far apart for the hardware to foresee

// N queries and 16 R elements of the head, the last `rest` of them in a register of their own, whose sums stay in registers. `known` rows
// are there to be asked for.
// value(j, d, mask) are 16 floats, weight(i, j) what query i gives to key j.
template <int N, int R, bool Whole, class V, class W, class A>
inline __attribute__((always_inline)) void mix_of(int64_t count, int64_t known, int64_t i0, int64_t d0, __mmask16 some, const Rows& out, V&& value, W&& weight, A&& ahead) {
  const __mmask16 mask = Whole ? __mmask16(0xFFFF) : some;
  __m512 acc[N][R];
  float* y = out.data + i0 * out.stride + d0;
  unrolled<N * R>([&](auto k) {
    constexpr int I = decltype(k)::value / R, E = decltype(k)::value % R;
    acc[I][E] = _mm512_maskz_loadu_ps(mask, y + I * out.stride + 16 * E);
  });
  for (int64_t j = 0; j < count; ++j) {
    __m512 v[R];
    unrolled<R>([&](auto r) { v[r.value] = value(j, d0 + 16 * r.value, mask); });
    unrolled<(R + 1) / 2>([&](auto r) __attribute__((always_inline)) { ahead(least(j + kRowsAhead, known - 1), d0 + 32 * r.value); });
    unrolled<N>([&](auto i) __attribute__((always_inline)) {
      constexpr int I = decltype(i)::value;
      const __m512 p = _mm512_set1_ps(weight(i0 + I, j));
      unrolled<R>([&](auto r) { acc[I][r.value] = _mm512_fmadd_ps(p, v[r.value], acc[I][r.value]); });
    });
  }
  unrolled<N * R>([&](auto k) {
    constexpr int I = decltype(k)::value / R, E = decltype(k)::value % R;
    _mm512_mask_storeu_ps(y + I * out.stride + 16 * E, mask, acc[I][E]);
  });
}

template <class V, class W, class A>
inline void mix(int64_t count, int64_t known, int64_t head_dim, int64_t n, const Rows& out, V&& value, W&& weight, A&& ahead) {
  int64_t i = 0;
  const auto take = [&](auto queries, auto registers) {
    constexpr int N = decltype(queries)::value, R = decltype(registers)::value;
    for (; i + N <= n; i += N) {
      int64_t d = 0;
      for (; d + 16 * R <= head_dim; d += 16 * R) mix_of<N, R, true>(count, known, i, d, 0, out, value, weight, ahead);
      for (; d < head_dim; d += 16) mix_of<N, 1, false>(count, known, i, d, first(head_dim - d), out, value, weight, ahead);
    }
  };
  take(Index<8>{}, Index<2>{});
  take(Index<4>{}, Index<4>{});
  take(Index<2>{}, Index<8>{});
  take(Index<1>{}, Index<8>{});
}

void mix_f16(const uint16_t* values, int64_t count, int64_t head_dim, ConstRows p, int64_t n, Rows out) {
  mix(count, count, head_dim, n, out, [&](int64_t j, int64_t d, __mmask16 k) { return halves(values + j * head_dim + d, k); },
      [&](int64_t i, int64_t j) { return p.data[i * p.stride + j]; },
      [&](int64_t j, int64_t d) __attribute__((always_inline)) { prefetch(reinterpret_cast<const uint8_t*>(values + j * head_dim + d)); });
}

void mix_q8(const int8_t* values, const float* value_scale, int64_t count, int64_t head_dim, ConstRows p, int64_t n, Rows out) {
  constexpr int64_t kValues = 64;
  float weight[kQueries][kValues]; // multiplied once, not for every part of the head; and a broadcast from memory is free
  for (int64_t j0 = 0; j0 < count; j0 += kValues, values += kValues * head_dim) {
    const int64_t rows = least(kValues, count - j0);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < rows; ++j) weight[i][j] = p.data[i * p.stride + j0 + j] * value_scale[j0 + j];
    mix(rows, count - j0, head_dim, n, out, [&](int64_t j, int64_t d, __mmask16 k) { return signed_bytes(values + j * head_dim + d, k); },
        [&](int64_t i, int64_t j) { return weight[i][j]; },
        [&](int64_t j, int64_t d) __attribute__((always_inline)) { prefetch(reinterpret_cast<const uint8_t*>(values + j * head_dim + d)); });
  }
}

// ---- the other slots -----------------------------------------------------------------------------------------------

void quantize(const float* x, int64_t cols, int group, int8_t* q, float* scale, int32_t* sum) {
  const int64_t groups = (cols + group - 1) / group;
  for (int64_t g = 0; g < groups; ++g, q += group) {
    const float* in = x + g * group;
    const int64_t n = least(group, cols - g * group);
    __m512 top = _mm512_setzero_ps(); // max(x, top) keeps top where x is not a number, as fmax does
    for (int64_t i = 0; i < n; i += 16) top = _mm512_max_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(first(n - i), in + i)), top);
    float largest = _mm512_reduce_max_ps(top);
    if (!(largest > 0x1p-100f)) largest = 0.0f;
    const __m512 inverse = _mm512_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < group; i += 16) {
      const __m512 v = i < n ? _mm512_maskz_loadu_ps(first(n - i), in + i) : _mm512_setzero_ps();
      const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)); // rounds half to even
      total = _mm512_add_epi32(total, code);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm512_cvtepi32_epi8(code));
    }
    scale[g] = largest / 127.0f;
    sum[g] = _mm512_reduce_add_epi32(total);
  }
}

// Lanes half to half, as in the scalar table.
inline float add_lanes(__m512 v) {
  const __m256 low = _mm512_castps512_ps256(v), high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  const __m256 eight = _mm256_add_ps(low, high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

// 32 lanes, multiply and add apart.
float dot_f32(const float* a, const float* b, int64_t n) {
  __m512 acc[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0; i < n; i += 32)
    unrolled<2>([&](auto l) {
      constexpr int L = decltype(l)::value;
      const int64_t at = i + 16 * L;
      const __mmask16 k = at < n ? first(n - at) : __mmask16(0);
      prefetch(reinterpret_cast<const uint8_t*>(a + at) + kAheadBytes); // a router's weights follow each other
      acc[L] = _mm512_add_ps(acc[L], _mm512_mul_ps(_mm512_maskz_loadu_ps(k, a + at), _mm512_maskz_loadu_ps(k, b + at)));
    });
  return add_lanes(_mm512_add_ps(acc[0], acc[1]));
}

float sum_squares(const float* x, int64_t n) { return dot_f32(x, x, n); }

inline __m512 power_of_two(__m512i n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23)); }

// As in the scalar table, operation by operation.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), _mm512_min_ps(_mm512_set1_ps(150.0f), x)); // this order lets NaN through
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_sub_ps(x, _mm512_mul_ps(n, _mm512_set1_ps(0.693359375f)));
  r = _mm512_sub_ps(r, _mm512_mul_ps(n, _mm512_set1_ps(-2.12194440e-4f)));
  __m512 p = _mm512_set1_ps(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_add_ps(_mm512_mul_ps(p, r), _mm512_set1_ps(c));
  const __m512i whole = _mm512_cvtps_epi32(n), part = _mm512_srai_epi32(whole, 1);
  return _mm512_mul_ps(_mm512_mul_ps(p, power_of_two(part)), power_of_two(_mm512_sub_epi32(whole, part)));
}

float exp_sum(float* x, float offset, int64_t n) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 k = first(n - i);
    const __m512 e = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(k, x + i), _mm512_set1_ps(offset)));
    _mm512_mask_storeu_ps(x + i, k, e);
    sum = _mm512_mask_add_ps(sum, k, sum, e);
  }
  return add_lanes(sum);
}

void silu_mul(float* gate, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 k = first(n - i);
    const __m512 g = _mm512_maskz_loadu_ps(k, gate + i);
    const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), g)));
    _mm512_mask_storeu_ps(gate + i, k, _mm512_mul_ps(_mm512_div_ps(g, below), _mm512_maskz_loadu_ps(k, up + i)));
  }
}

void to_f16(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 k = first(n - i);
    _mm256_mask_storeu_epi16(y + i, k, _mm512_cvtps_ph(_mm512_maskz_loadu_ps(k, x + i), _MM_FROUND_TO_NEAREST_INT));
  }
}

void to_f32(const uint16_t* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) _mm512_mask_storeu_ps(y + i, first(n - i), halves(x + i, first(n - i)));
}

uint64_t read_bytes(const uint8_t* p, int64_t n) {
  __m512i acc[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  int64_t i = 0;
  for (; i + 256 <= n; i += 256)
    unrolled<4>([&](auto l) {
      constexpr int L = decltype(l)::value;
      prefetch(p + i + 64 * L + kAheadBytes);
      acc[L] = _mm512_xor_si512(acc[L], load(p + i + 64 * L));
    });
  for (; i < n; i += 64) acc[0] = _mm512_xor_si512(acc[0], load(p + i));
  alignas(64) uint64_t lane[8];
  _mm512_store_si512(lane, _mm512_xor_si512(_mm512_xor_si512(acc[0], acc[1]), _mm512_xor_si512(acc[2], acc[3])));
  return lane[0] ^ lane[1] ^ lane[2] ^ lane[3] ^ lane[4] ^ lane[5] ^ lane[6] ^ lane[7];
}

} // namespace

const KernelTable kAvx512Table = {"avx512", quantize, avx512::matmul, avx512::variant, dot_f32, scores_f16, scores_q8, mix_f16,
                                  mix_q8,   sum_squares, exp_sum, silu_mul, to_f16, to_f32, read_bytes};

} // namespace d2moe
