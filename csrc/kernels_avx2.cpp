// AVX2 with FMA and F16C. A register pair is 16 rows x 4 columns. vpmaddubsw adds pairs in saturating int16, so codes
// are right-aligned here and at most 7 bits; full 8-bit codes are widened to int16 first. The integers are the same.
#include "kernels.h"

#include <immintrin.h>
#include <utility>

namespace d2moe {
namespace {

constexpr int64_t kChunkBytes = 16 << 10; // unpacked codes kept in L1 between two passes over the tokens
constexpr int64_t kAheadBytes = 2048;     // software prefetch of the base; hardware prefetchers stop at 4 KiB pages
constexpr int kFewTokens = 4;             // up to here one block at a time, so that unpacking overlaps the reads

template <int N> struct Index { static constexpr int value = N; };
template <class F, int... I> inline __attribute__((always_inline)) void each(F&& f, std::integer_sequence<int, I...>) {
  (f(Index<I>{}), ...);
}
template <int N, class F> inline __attribute__((always_inline)) void unrolled(F&& f) {
  each(f, std::make_integer_sequence<int, N>{});
}

inline __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i four(const int8_t* q) { // four activations in every lane
  int32_t v;
  __builtin_memcpy(&v, q, 4);
  return _mm256_set1_epi32(v);
}
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

// ---- unpacking -------------------------------------------------------------------------------------------------

// Bits `mask` of v after a shift by N to the left (right if negative); bits that cross a byte are masked away.
template <int N> inline __m256i bits_at(__m256i v, int mask) {
  if constexpr (N > 0) v = _mm256_slli_epi16(v, N);
  if constexpr (N < 0) v = _mm256_srli_epi16(v, -N);
  return _mm256_and_si256(v, _mm256_set1_epi8(char(mask)));
}

// Codes of `count` units of 32 columns as BITS-bit numbers, register order.
template <int BITS> void unpack_nested(const Matrix& w, int64_t unit0, int64_t count, uint8_t* out) {
  constexpr int kPrefetch = kAheadBytes / 128;
  for (int64_t unit = unit0; unit < unit0 + count; ++unit, out += 512) {
    prefetch(w.base + (unit + kPrefetch) * 128);
    prefetch(w.base + (unit + kPrefetch) * 128 + 64);
    for (int p = 0; p < BITS - kBaseBits; ++p) prefetch(w.planes[p] + (unit + kPrefetch) * 64);
    for (int side = 0; side < 64; side += 32) { // rows 0-7, rows 8-15
      const __m256i word[2] = {load(w.base + unit * 128 + side), load(w.base + unit * 128 + 64 + side)};
      unrolled<8>([&](auto f) {
        constexpr int F = decltype(f)::value;
        __m256i code = bits_at<BITS - 2 - 2 * (F % 4)>(word[F / 4], 3 << (BITS - 2));
        unrolled<BITS - kBaseBits>([&](auto p) {
          constexpr int P = decltype(p)::value, kPlace = BITS - 3 - P;
          code = _mm256_or_si256(code, bits_at<kPlace - F>(load(w.planes[P] + unit * 64 + side), 1 << kPlace));
        });
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + 64 * F + side), code);
      });
    }
  }
}

template <int BITS> void unpack_flat(const Matrix& w, int64_t unit0, int64_t count, uint8_t* out) {
  const uint8_t* flat = w.flat + unit0 * 512;
  for (int64_t i = 0; i < count * 512; i += 64) {
    prefetch(flat + i + kAheadBytes);
    for (int side = 0; side < 64; side += 32)
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + i + side), bits_at<BITS - 8>(load(flat + i + side), (1 << BITS) - 1));
  }
}

template <int BITS> void unpack(const Matrix& w, int64_t unit0, int64_t count, uint8_t* out) {
  w.flat ? unpack_flat<BITS>(w, unit0, count, out) : unpack_nested<BITS>(w, unit0, count, out);
}

// ---- products ----------------------------------------------------------------------------------------------------

// Sums of 32 columns for 8 rows; `codes` and `q` advance by 64 and 4 per register.
template <int BITS> inline __m256i dot_unit(__m256i total, const uint8_t* codes, const int8_t* q) {
  if constexpr (BITS == 8) {
    unrolled<8>([&](auto f) {
      constexpr int F = decltype(f)::value;
      const __m256i code = load(codes + 64 * F), v = four(q + 4 * F);
      const __m256i even = _mm256_madd_epi16(_mm256_and_si256(code, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
      const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(code, 8), _mm256_srai_epi16(v, 8));
      total = _mm256_add_epi32(total, _mm256_add_epi32(even, odd));
    });
  } else {
    // So many pairs of (2^BITS - 1) * 128 fit in int16.
    constexpr int kDepth = BITS <= 4 ? 8 : BITS == 5 ? 4 : BITS == 6 ? 2 : 1;
    unrolled<8 / kDepth>([&](auto d) {
      __m256i pairs = _mm256_setzero_si256();
      unrolled<kDepth>([&](auto f) {
        constexpr int F = decltype(d)::value * kDepth + decltype(f)::value;
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(load(codes + 64 * F), four(q + 4 * F)));
      });
      total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    });
  }
  return total;
}

// The float part, exactly as at KernelTable::matmul, for 8 rows; the dot is shifted up to the left-aligned code's.
struct Affine {
  __m256 s, low;
  explicit Affine(const uint16_t* p)
      : s(_mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), _mm256_set1_ps(0x1p-8f))),
        low(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + kTileRows)))) {}

  __m256 add(__m256 acc, __m256i dot, float half_t, float t, float scale) const {
    const __m256 inner = _mm256_add_ps(_mm256_mul_ps(s, _mm256_add_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(half_t))),
                                       _mm256_mul_ps(low, _mm256_set1_ps(t)));
    return _mm256_add_ps(acc, _mm256_mul_ps(_mm256_set1_ps(scale), inner));
  }
};

// A run of groups of one tile, unpacked.
struct Chunk {
  const uint8_t* codes;
  const uint16_t* affine;
  int64_t group0, count;
  int group;
};

// Sums of T tokens and all 16 rows in `acc` [T, 16].
template <int BITS, int T> void multiply_chunk(const Chunk& c, const Activations& x, int64_t groups, int64_t i0, float* acc) {
  const int64_t stride = groups * c.group;
  const float half = float(1 << (8 - BITS)) * 0.5f;
  for (int64_t g = 0; g < c.count; ++g) {
    const uint8_t* codes = c.codes + g * c.group * kTileRows;
    const int8_t* q = x.q + i0 * stride + (c.group0 + g) * c.group;
    __m256i dot[2][T];
    for (int i = 0; i < T; ++i) dot[0][i] = dot[1][i] = _mm256_setzero_si256();
    for (int j = 0; j < c.group; j += 32)
      for (int i = 0; i < T; ++i)
        for (int side = 0; side < 2; ++side)
          dot[side][i] = dot_unit<BITS>(dot[side][i], codes + j * kTileRows + 32 * side, q + i * stride + j);
    for (int side = 0; side < 2; ++side) {
      const Affine affine(c.affine + g * 2 * kTileRows + 8 * side);
      for (int i = 0; i < T; ++i) {
        const int64_t at = (i0 + i) * groups + c.group0 + g;
        const float t = float(x.sum[at]);
        float* a = acc + i * kTileRows + 8 * side;
        _mm256_storeu_ps(a, affine.add(_mm256_loadu_ps(a), _mm256_slli_epi32(dot[side][i], 8 - BITS), half * t, t, x.scale[at]));
      }
    }
  }
}

template <int BITS>
void multiply(const Matrix& w, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  alignas(64) uint8_t codes[kChunkBytes];
  const bool few = x.m <= kFewTokens;
  const int group = w.shape.group, units = group / 32;
  const int64_t groups = w.shape.groups(), most = few ? 1 : kChunkBytes / (kTileRows * group);
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    float* out = y + tile * kTileRows;
    const int64_t rows = least(w.shape.rows - tile * kTileRows, kTileRows);
    alignas(32) float acc[kFewTokens * kTileRows] = {}; // stays here while there are few tokens, else goes by way of y
    for (int64_t g = 0; g < groups; g += most) {
      const int64_t block = tile * groups + g;
      const Chunk c{codes, w.affine + block * 2 * kTileRows, g, least(most, groups - g), group};
      unpack<BITS>(w, block * units, c.count * units, codes);
      for (int64_t i = 0; i < x.m;) {
        const int64_t n = x.m - i >= 4 ? 4 : x.m - i >= 2 ? 2 : 1;
        float* a = acc + (few ? i * kTileRows : 0);
        for (int64_t k = 0; !few && k < n; ++k)
          for (int64_t r = 0; r < rows; ++r) a[k * kTileRows + r] = g ? out[(i + k) * ldy + r] : 0.0f;
        if (n == 4) multiply_chunk<BITS, 4>(c, x, groups, i, a);
        else if (n == 2) multiply_chunk<BITS, 2>(c, x, groups, i, a);
        else multiply_chunk<BITS, 1>(c, x, groups, i, a);
        for (int64_t k = 0; (!few || g + 1 == groups) && k < n; ++k)
          for (int64_t r = 0; r < rows; ++r) out[(i + k) * ldy + r] = a[k * kTileRows + r];
        i += n;
      }
    }
  }
}

void matmul(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  constexpr void (*by_width[])(const Matrix&, const Activations&, int64_t, int64_t, float*, int64_t) = {
      multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>, multiply<7>, multiply<8>};
  by_width[bits - kBaseBits](w, x, tile0, tile1, y, ldy);
}

// ---- the other slots -----------------------------------------------------------------------------------------------

inline __m256 halves(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

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

// sum of a(i) * b[i] in 32 lanes, multiply and add apart, lanes half to half: as in the scalar table. a_tail and b_tail
// hold what is left after whole 32s, padded with zeros.
template <class A> inline float dot(int64_t whole, const float* b, A&& a, const __m256* a_tail, const float* b_tail) {
  __m256 acc[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t i = 0; i < whole; i += 32)
    for (int l = 0; l < 4; ++l) acc[l] = _mm256_add_ps(acc[l], _mm256_mul_ps(a(i + 8 * l), _mm256_loadu_ps(b + i + 8 * l)));
  for (int l = 0; a_tail && l < 4; ++l) acc[l] = _mm256_add_ps(acc[l], _mm256_mul_ps(a_tail[l], _mm256_load_ps(b_tail + 8 * l)));
  return add_lanes(_mm256_add_ps(_mm256_add_ps(acc[0], acc[2]), _mm256_add_ps(acc[1], acc[3])));
}

float dot_f32(const float* a, const float* b, int64_t n) {
  const int64_t whole = n & -32;
  const auto load = [&](int64_t i) { return _mm256_loadu_ps(a + i); };
  if (whole == n) return dot(whole, b, load, nullptr, nullptr);
  alignas(32) float at[32] = {}, bt[32] = {};
  for (int64_t i = whole; i < n; ++i) at[i - whole] = a[i], bt[i - whole] = b[i];
  const __m256 tail[4] = {_mm256_load_ps(at), _mm256_load_ps(at + 8), _mm256_load_ps(at + 16), _mm256_load_ps(at + 24)};
  return dot(whole, b, load, tail, bt);
}

float dot_f16(const uint16_t* a, const float* b, int64_t n) {
  const int64_t whole = n & -32;
  const auto load = [&](int64_t i) { return halves(a + i); };
  if (whole == n) return dot(whole, b, load, nullptr, nullptr);
  alignas(32) uint16_t at[32] = {};
  alignas(32) float bt[32] = {};
  for (int64_t i = whole; i < n; ++i) at[i - whole] = a[i], bt[i - whole] = b[i];
  const __m256 tail[4] = {halves(at), halves(at + 8), halves(at + 16), halves(at + 24)};
  return dot(whole, b, load, tail, bt);
}

float sum_squares(const float* x, int64_t n) { return dot_f32(x, x, n); }

void axpy_f16(float alpha, const uint16_t* x, float* y, int64_t n) {
  const __m256 a = _mm256_set1_ps(alpha);
  const int64_t whole = n & -8;
  for (int64_t i = 0; i < whole; i += 8) _mm256_storeu_ps(y + i, _mm256_add_ps(_mm256_loadu_ps(y + i), _mm256_mul_ps(a, halves(x + i))));
  const Tail<uint16_t> xt(x + whole, n - whole);
  Tail<float> yt(y + whole, n - whole);
  _mm256_store_ps(yt.v, _mm256_add_ps(_mm256_load_ps(yt.v), _mm256_mul_ps(a, halves(xt.v))));
  yt.put(y + whole, n - whole);
}

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

} // namespace

const KernelTable kAvx2Table = {"avx2",      quantize, matmul,   dot_f32, dot_f16, axpy_f16,
                                sum_squares, exp_sum,  silu_mul, to_f16,  to_f32,  read_bytes};

} // namespace d2moe
