// AVX-512 with VNNI: a register is 16 rows x 4 columns, one int32 lane a row. Codes stay left-aligned (the prefix in its
// place, low bits zero), so vpdpbusd needs no shifts and no width ever saturates. Only this file is compiled for AVX-512.
#include "kernels.h"

#include <utility>

#if defined(__GNUC__) && !defined(__clang__) // GCC 12 warns of its own _mm512_undefined_ps (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace d2moe {
namespace {

constexpr int kFewTokens = 4;             // up to here codes are used straight from registers
constexpr int kPanelTokens = 96;          // above, the activations of so many tokens and columns are kept at hand, in
constexpr int kPanelCols = 512;           // L2, and the codes of one tile's columns, unpacked once, in L1
constexpr int kPanelGroups = kPanelCols / 32;
constexpr int64_t kAheadBytes = 2048;     // software prefetch of the base; hardware prefetchers stop at 4 KiB pages

template <int N> struct Index { static constexpr int value = N; };
template <class F, int... I> inline __attribute__((always_inline)) void each(F&& f, std::integer_sequence<int, I...>) {
  (f(Index<I>{}), ...);
}
// Loops whose index is a constant; GCC keeps arrays in registers only where no loop is left.
template <int N, class F> inline __attribute__((always_inline)) void unrolled(F&& f) {
  each(f, std::make_integer_sequence<int, N>{});
}

inline __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }

// sum += codes (unsigned) x four activations at q, for every lane. Assembly, because GCC 12 makes of the intrinsic two
// register moves and a separate broadcast, which halves the speed of prompts.
inline __attribute__((always_inline)) void add_products(__m512i& sum, __m512i codes, const int8_t* q) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const int8_t(*)[4]>(q)));
}
template <int T, int C> inline __attribute__((always_inline)) void clear(__m512i (&dot)[T][C]) {
  unrolled<T * C>([&](auto k) { dot[k.value / C][k.value % C] = _mm512_setzero_si512(); });
}
template <int C> inline __attribute__((always_inline)) __m512i total(const __m512i (&dot)[C]) {
  if constexpr (C == 1) return dot[0];
  else if constexpr (C == 2) return _mm512_add_epi32(dot[0], dot[1]);
  else return _mm512_add_epi32(_mm512_add_epi32(dot[0], dot[1]), _mm512_add_epi32(dot[2], dot[3]));
}
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

// ---- unpacking -------------------------------------------------------------------------------------------------

// Left by N, right if N is negative; bits that cross a byte are masked away by the caller.
template <int N> inline __m512i shift(__m512i v) {
  if constexpr (N > 0) return _mm512_slli_epi16(v, N);
  else if constexpr (N < 0) return _mm512_srli_epi16(v, -N);
  else return v;
}

// code | (bit F of every plane from P on, put in its place)
template <int BITS, int F, int P> inline __attribute__((always_inline)) __m512i add_bits(__m512i code, const __m512i (&plane)[kPlanes]) {
  if constexpr (P == BITS - kBaseBits) return code;
  else return add_bits<BITS, F, P + 1>(
      _mm512_ternarylogic_epi32(code, shift<5 - P - F>(plane[P]), _mm512_set1_epi8(0x20 >> P), 0xF8), plane);
}

// The 8 registers of 32 columns. BITS 0 stands for a flat matrix at any width: there the width is only a mask.
struct Unit { __m512i code[8]; };

template <int BITS> inline __attribute__((always_inline)) Unit unit_codes(const Matrix& w, __m512i mask, int64_t unit) {
  Unit u;
  if constexpr (BITS == 0) {
    const uint8_t* flat = w.flat + unit * 512;
    unrolled<8>([&](auto f) { u.code[f.value] = _mm512_and_si512(load(flat + 64 * f.value), mask); });
  } else {
    const uint8_t* base = w.base + unit * 128;
    const __m512i word[2] = {load(base), load(base + 64)};
    __m512i plane[kPlanes];
    unrolled<BITS - kBaseBits>([&](auto p) { plane[p.value] = load(w.planes[p.value] + unit * 64); });
    unrolled<8>([&](auto f) {
      constexpr int F = decltype(f)::value;
      const __m512i top = _mm512_and_si512(shift<6 - 2 * (F % 4)>(word[F / 4]), _mm512_set1_epi8(char(0xC0)));
      u.code[F] = add_bits<BITS, F, 0>(top, plane);
    });
  }
  return u;
}

// Two bits and one token, where unpacking takes longest: the fields stay where they are, bits 2i+1..2i for register i of
// a word, and the sums are shifted instead of the codes.
inline __attribute__((always_inline)) Unit unit_fields(const Matrix& w, int64_t unit) {
  const uint8_t* base = w.base + unit * 128;
  Unit u;
  unrolled<8>([&](auto f) {
    constexpr int F = decltype(f)::value;
    u.code[F] = _mm512_and_si512(load(base + F / 4 * 64), _mm512_set1_epi8(char(3 << 2 * (F % 4))));
  });
  return u;
}

inline __m512i total_of_fields(const __m512i (&dot)[4]) {
  return _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(dot[0], 6), _mm512_slli_epi32(dot[1], 4)),
                          _mm512_add_epi32(_mm512_slli_epi32(dot[2], 2), dot[3]));
}

// Two lines into L2. A single stream gains a tenth from this second, longer reach; several at once lose a fifth.
inline void prefetch_far(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(p + 64), _MM_HINT_T1);
}

// The streams of a nested matrix run in step; each is prefetched so far ahead that together they cover the latency.
template <int BITS> inline void prefetch_unit(const Matrix& w, int64_t unit, int64_t ahead) {
  if constexpr (BITS == 0) {
    for (int f = 0; f < 8; ++f) prefetch(w.flat + (unit + ahead) * 512 + 64 * f);
  } else {
    prefetch(w.base + (unit + ahead) * 128);
    prefetch(w.base + (unit + ahead) * 128 + 64);
    for (int p = 0; p < BITS - kBaseBits; ++p) prefetch(w.planes[p] + (unit + ahead) * 64);
  }
}

// ---- the float part: exactly as at KernelTable::matmul -----------------------------------------------------------

struct Affine {
  __m512 s, low;
  explicit Affine(const uint16_t* p)
      : s(_mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), _mm512_set1_ps(0x1p-8f))),
        low(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + kTileRows)))) {}

  __m512 add(__m512 acc, __m512i dot, __m512 half_t, __m512 t, __m512 scale) const {
    const __m512 inner = _mm512_add_ps(_mm512_mul_ps(s, _mm512_add_ps(_mm512_cvtepi32_ps(dot), half_t)), _mm512_mul_ps(low, t));
    return _mm512_add_ps(acc, _mm512_mul_ps(scale, inner));
  }
};

inline __mmask16 row_mask(const Matrix& w, int64_t tile) {
  const int64_t rows = w.shape.rows - tile * kTileRows;
  return rows >= kTileRows ? __mmask16(0xFFFF) : __mmask16((1u << rows) - 1);
}

// ---- few tokens: bound by memory ---------------------------------------------------------------------------------

template <int BITS, int T>
void multiply_few(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  constexpr bool fields = BITS == 2 && T == 1;
  constexpr int kChains = T == 1 ? 4 : 2; // sums in flight per token, against the latency of vpdpbusd
  const int group = w.shape.group, units = group / 32;
  const int64_t groups = w.shape.groups(), stride = groups * group;
  const int64_t ahead = BITS ? kAheadBytes / 128 : kAheadBytes / 512;
  const __m512 half = _mm512_set1_ps(float(1 << (8 - bits)) * 0.5f);
  const __m512i mask = _mm512_set1_epi8(char(0xFF00 >> bits));
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    __m512 acc[T];
    unrolled<T>([&](auto i) { acc[i.value] = _mm512_setzero_ps(); });
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t block = tile * groups + g;
      const int8_t* q = x.q + g * group;
      __m512i dot[T][kChains];
      clear(dot);
      for (int u = 0; u < units; ++u, q += 32) {
        prefetch_unit<BITS>(w, block * units + u, ahead);
        if constexpr (BITS == 2) prefetch_far(w.base + (block * units + u + 4 * ahead) * 128);
        Unit unit;
        if constexpr (fields) unit = unit_fields(w, block * units + u);
        else unit = unit_codes<BITS>(w, mask, block * units + u);
        unrolled<8 * T>([&](auto k) __attribute__((always_inline)) {
          constexpr int F = decltype(k)::value / T, I = decltype(k)::value % T;
          add_products(dot[I][F % kChains], unit.code[F], q + I * stride + 4 * F);
        });
      }
      const uint16_t* scales = w.affine + block * 2 * kTileRows;
      prefetch(reinterpret_cast<const uint8_t*>(scales) + kAheadBytes);
      const Affine affine(scales);
      unrolled<T>([&](auto index) __attribute__((always_inline)) {
        constexpr int I = decltype(index)::value;
        const int64_t at = I * groups + g;
        const __m512 t = _mm512_cvtepi32_ps(_mm512_set1_epi32(x.sum[at]));
        __m512i sum;
        if constexpr (fields) sum = total_of_fields(dot[I]);
        else sum = total(dot[I]);
        acc[I] = affine.add(acc[I], sum, _mm512_mul_ps(half, t), t, _mm512_set1_ps(x.scale[at]));
      });
    }
    const __mmask16 rows = row_mask(w, tile);
    unrolled<T>([&](auto i) { _mm512_mask_storeu_ps(y + i.value * ldy + tile * kTileRows, rows, acc[i.value]); });
  }
}

// ---- many tokens: bound by vpdpbusd ------------------------------------------------------------------------------

template <int BITS> void unpack(const Matrix& w, int bits, int64_t unit0, int64_t count, uint8_t* out) {
  const __m512i mask = _mm512_set1_epi8(char(0xFF00 >> bits));
  for (int64_t unit = unit0; unit < unit0 + count; ++unit, out += 512) {
    const Unit u = unit_codes<BITS>(w, mask, unit);
    unrolled<8>([&](auto f) { _mm512_store_si512(out + 64 * f.value, u.code[f.value]); });
  }
}

// Some columns of some tokens, copied to fixed distances: then one pointer addresses all tokens of a product.
struct Panel {
  alignas(64) int8_t q[kPanelTokens][kPanelCols + 64]; // 64: rows shall not fall into the same cache sets
  float t[kPanelGroups][kPanelTokens], half_t[kPanelGroups][kPanelTokens], scale[kPanelGroups][kPanelTokens];
  int64_t group0, count;
  int group;

  void fill(const Activations& x, int64_t groups, float half) {
    for (int64_t i = 0; i < x.m; ++i) {
      const int8_t* from = x.q + (i * groups + group0) * group;
      for (int64_t c = 0; c < count * group; c += 32)
        _mm256_store_si256(reinterpret_cast<__m256i*>(q[i] + c), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + c)));
      for (int64_t g = 0; g < count; ++g) {
        const int64_t at = i * groups + group0 + g;
        t[g][i] = float(x.sum[at]);
        half_t[g][i] = half * t[g][i];
        scale[g][i] = x.scale[at];
      }
    }
  }
};

// Sums in flight per token for T tokens: vpdpbusd takes 5 cycles and two start in each, so at least 10 in all.
constexpr int chains(int tokens) { return tokens >= 10 ? 1 : tokens >= 5 ? 2 : 4; }

template <int T>
void multiply_panel(const Panel& p, int64_t i0, const uint8_t* codes, const uint16_t* affine, __mmask16 rows, float* y, int64_t ldy) {
  constexpr int kChains = chains(T);
  __m512 acc[T];
  unrolled<T>([&](auto i) { acc[i.value] = p.group0 ? _mm512_maskz_loadu_ps(rows, y + i.value * ldy) : _mm512_setzero_ps(); });
  const int8_t* q = p.q[i0];
  for (int64_t g = 0; g < p.count; ++g) {
    __m512i dot[T][kChains];
    clear(dot);
    for (int j = 0; j < p.group; j += 32, q += 32, codes += 512)
      unrolled<8 * T>([&](auto k) __attribute__((always_inline)) {
        constexpr int F = decltype(k)::value / T, I = decltype(k)::value % T;
        add_products(dot[I][F % kChains], _mm512_load_si512(codes + 64 * F), q + I * int(sizeof p.q[0]) + 4 * F);
      });
    const Affine scales(affine + g * 2 * kTileRows);
    const float *half_t = p.half_t[g] + i0, *t = p.t[g] + i0, *scale = p.scale[g] + i0;
    unrolled<T>([&](auto index) __attribute__((always_inline)) {
      constexpr int I = decltype(index)::value;
      acc[I] = scales.add(acc[I], total(dot[I]), _mm512_set1_ps(half_t[I]), _mm512_set1_ps(t[I]), _mm512_set1_ps(scale[I]));
    });
  }
  unrolled<T>([&](auto i) { _mm512_mask_storeu_ps(y + i.value * ldy, rows, acc[i.value]); });
}

// x.m is at most kPanelTokens.
template <int BITS>
void multiply_many(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  alignas(64) uint8_t codes[kTileRows * kPanelCols];
  Panel p;
  const int units = w.shape.group / 32;
  const int64_t groups = w.shape.groups(), most = kPanelCols / w.shape.group;
  p.group = w.shape.group;
  for (p.group0 = 0; p.group0 < groups; p.group0 += most) {
    p.count = least(most, groups - p.group0);
    p.fill(x, groups, float(1 << (8 - bits)) * 0.5f);
    for (int64_t tile = tile0; tile < tile1; ++tile) {
      const int64_t block = tile * groups + p.group0;
      unpack<BITS>(w, bits, block * units, p.count * units, codes);
      // The next tile comes in while this one is multiplied.
      for (int64_t u = 0; u < p.count * units; ++u) prefetch_unit<BITS>(w, block * units + u, groups * units);
      const uint16_t* affine = w.affine + block * 2 * kTileRows;
      const __mmask16 rows = row_mask(w, tile);
      float* out = y + tile * kTileRows;
      int64_t i = 0;
      const auto take = [&](auto tokens) __attribute__((always_inline)) {
        constexpr int T = decltype(tokens)::value;
        for (; i + T <= x.m; i += T) multiply_panel<T>(p, i, codes, affine, rows, out + i * ldy, ldy);
      };
      take(Index<12>{});
      take(Index<8>{});
      take(Index<4>{});
      take(Index<2>{});
      take(Index<1>{});
    }
  }
}

using Multiply = void (*)(const Matrix&, int, const Activations&, int64_t, int64_t, float*, int64_t);

template <int BITS> Multiply choose(int64_t m) {
  constexpr Multiply few[kFewTokens] = {multiply_few<BITS, 1>, multiply_few<BITS, 2>, multiply_few<BITS, 3>, multiply_few<BITS, 4>};
  return m <= kFewTokens ? few[m - 1] : multiply_many<BITS>;
}

void matmul(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  constexpr Multiply (*by_width[])(int64_t) = {choose<2>, choose<3>, choose<4>, choose<5>, choose<6>, choose<7>, choose<8>};
  const int64_t groups = w.shape.groups(), stride = groups * w.shape.group;
  for (int64_t i = 0; i < x.m; i += kPanelTokens) {
    const Activations part{x.q + i * stride, x.scale + i * groups, x.sum + i * groups, least(kPanelTokens, x.m - i)};
    (w.flat ? choose<0> : by_width[bits - kBaseBits])(part.m)(w, bits, part, tile0, tile1, y + i * ldy, ldy);
  }
}

// ---- the other slots -----------------------------------------------------------------------------------------------

inline __mmask16 first(int64_t n) { return n >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << n) - 1); }
inline __m512 halves(const uint16_t* p, __mmask16 k) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(k, p)); }

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

// sum of a(i, mask) * b(i, mask) over n floats in 32 lanes, multiply and add apart.
template <class A, class B> inline float dot(int64_t n, A&& a, B&& b) {
  __m512 acc[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0; i < n; i += 32)
    unrolled<2>([&](auto l) {
      constexpr int L = decltype(l)::value;
      const int64_t at = i + 16 * L;
      const __mmask16 k = at < n ? first(n - at) : __mmask16(0);
      acc[L] = _mm512_add_ps(acc[L], _mm512_mul_ps(a(at, k), b(at, k)));
    });
  return add_lanes(_mm512_add_ps(acc[0], acc[1]));
}

float dot_f32(const float* a, const float* b, int64_t n) {
  return dot(n, [&](int64_t i, __mmask16 k) { return _mm512_maskz_loadu_ps(k, a + i); },
             [&](int64_t i, __mmask16 k) { return _mm512_maskz_loadu_ps(k, b + i); });
}

float dot_f16(const uint16_t* a, const float* b, int64_t n) {
  return dot(n, [&](int64_t i, __mmask16 k) { return halves(a + i, k); },
             [&](int64_t i, __mmask16 k) { return _mm512_maskz_loadu_ps(k, b + i); });
}

float sum_squares(const float* x, int64_t n) { return dot_f32(x, x, n); }

void axpy_f16(float alpha, const uint16_t* x, float* y, int64_t n) {
  const __m512 a = _mm512_set1_ps(alpha);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 k = first(n - i);
    _mm512_mask_storeu_ps(y + i, k, _mm512_add_ps(_mm512_maskz_loadu_ps(k, y + i), _mm512_mul_ps(a, halves(x + i, k))));
  }
}

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

const KernelTable kAvx512Table = {"avx512",    quantize, matmul,   dot_f32, dot_f16, axpy_f16,
                                  sum_squares, exp_sum,  silu_mul, to_f16,  to_f32,  read_bytes};

} // namespace d2moe
