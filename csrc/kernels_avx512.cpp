// AVX-512 with VNNI: a register is 16 rows x 4 columns, one int32 lane a row. Only this file is compiled for AVX-512.
#include "kernels.h"

#include <utility>

#if defined(__GNUC__) && !defined(__clang__) // GCC 12 warns of its own _mm512_undefined_ps (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wignored-attributes" // of __m512 as a template argument; only its alignment matters
#endif
#include <immintrin.h>

namespace d2moe {
namespace {

constexpr int few_tokens(int bits) { return bits <= 4 ? 18 : 4; } // up to here codes are used straight from registers
constexpr int kPanelCols = 512;           // above, the codes of two tiles and so many columns are unpacked once, into L1,
constexpr int kPanelGroups = kPanelCols / 32;
constexpr int kPanelTokens = 192;         // for so many tokens at most, whose activations stay in L2 from tile to tile
constexpr int64_t kAheadBytes = 2048;     // software prefetch of the base; hardware prefetchers stop at 4 KiB pages

template <int N> struct Index { static constexpr int value = N; };
template <class F, int... I> inline __attribute__((always_inline)) void each(F&& f, std::integer_sequence<int, I...>) {
  (f(Index<I>{}), ...);
}
// Loops whose index is a constant; GCC keeps arrays in registers only where no loop is left.
template <int N, class F> inline __attribute__((always_inline)) void unrolled(F&& f) {
  each(f, std::make_integer_sequence<int, N>{});
}

// N registers. Nested structs and not an array: of an array that lives through a loop GCC keeps a copy in memory, up to date.
template <class V, int N> struct Registers {
  V head;
  Registers<V, N - 1> tail;
  template <int I> inline __attribute__((always_inline)) V& at() {
    if constexpr (I == 0) return head;
    else return tail.template at<I - 1>();
  }
};
template <class V> struct Registers<V, 0> {};

inline __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }

// sum += codes (unsigned) x four activations, for every lane. Assembly, because GCC 12 makes of the intrinsic two register
// moves and a separate broadcast, which halves the speed of prompts.
inline __attribute__((always_inline)) void add_products(__m512i& sum, __m512i codes, const int8_t* q) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const int8_t(*)[4]>(q)));
}
inline __attribute__((always_inline)) void add_products(__m512i& sum, __m512i codes, __m512i q) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(q));
}
inline __attribute__((always_inline)) __m512i four(const int8_t* q) {
  __m512i v;
  asm("vpbroadcastd %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const int8_t(*)[4]>(q)));
  return v;
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
inline __m512i bytes(int v) { return _mm512_set1_epi8(char(v)); }
// Bits of a where `mask` has ones, of b elsewhere.
inline __m512i pick(__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xCA); }

// Two planes as fields of two bits, registers 0-3 and 4-7: what kPlaneBit is made for. COUNT planes are there, the second
// bit of the fields is 0 where it is not.
template <int COUNT> inline __attribute__((always_inline)) void fields(const uint8_t* const* planes, int64_t unit, __m512i (&out)[2]) {
  const __m512i odd = bytes(0xAA), upper = load(planes[0] + unit * 64);
  if constexpr (COUNT >= 2) {
    const __m512i lower = load(planes[1] + unit * 64);
    out[0] = pick(odd, shift<1>(upper), lower);
    out[1] = pick(odd, upper, shift<-1>(lower));
  } else {
    out[0] = _mm512_and_si512(shift<1>(upper), odd);
    out[1] = _mm512_and_si512(upper, odd);
  }
}

// Fields of upper and of lower bits as nibbles: registers 0 (low nibble) and 2 (high), then 1 and 3.
template <bool LOWER> inline __attribute__((always_inline)) void nibbles(__m512i upper, __m512i lower, __m512i (&out)[2]) {
  const __m512i high = bytes(0xCC);
  if constexpr (LOWER) {
    out[0] = pick(high, shift<2>(upper), lower);
    out[1] = pick(high, upper, shift<-2>(lower));
  } else {
    out[0] = _mm512_and_si512(shift<2>(upper), high);
    out[1] = _mm512_and_si512(upper, high);
  }
}

// The 8 registers of 32 columns. Codes may stand in any bits of their byte: sums are shifted once a group, instead of all
// codes. kPlaces<BITS> places exist, register F is in place<BITS>(F), and a sum of that place is worth 2^raise<BITS>(place).
struct Unit { __m512i code[8]; };
template <int BITS> constexpr int kPlaces = BITS == 2 ? 4 : BITS <= 4 ? 2 : 1;
template <int BITS> constexpr int place(int f) { return BITS == 2 ? f % 4 : BITS <= 4 ? f % 4 / 2 : 0; }
template <int BITS> constexpr int raise(int place) { return BITS == 2 ? 6 - 2 * place : BITS <= 4 ? 4 - 4 * place : 0; }

template <int BITS> inline __attribute__((always_inline)) Unit unit_codes(const Matrix& w, int64_t unit) {
  Unit u;
  const __m512i base[2] = {load(w.base + unit * 128), load(w.base + unit * 128 + 64)};
  if constexpr (BITS == 2) {
    unrolled<8>([&](auto f) {
      constexpr int F = decltype(f)::value;
      u.code[F] = _mm512_and_si512(base[F / 4], bytes(3 << 2 * (F % 4)));
    });
  } else {
    const __m512i high = bytes(0xF0), low = bytes(0x0F);
    __m512i second[2], third[2], fourth[2];
    fields<BITS - 2>(w.planes, unit, second);
    if constexpr (BITS >= 5) fields<BITS - 4>(w.planes + 2, unit, third);
    if constexpr (BITS >= 7) fields<BITS - 6>(w.planes + 4, unit, fourth);
    unrolled<2>([&](auto half) __attribute__((always_inline)) {
      constexpr int H = decltype(half)::value;
      __m512i top[2], bottom[2];
      nibbles<true>(base[H], second[H], top);
      if constexpr (BITS >= 5) nibbles<(BITS >= 7)>(third[H], fourth[H], bottom);
      unrolled<2>([&](auto index) __attribute__((always_inline)) {
        constexpr int I = decltype(index)::value;
        if constexpr (BITS <= 4) {
          u.code[4 * H + I] = _mm512_and_si512(top[I], low);
          u.code[4 * H + I + 2] = _mm512_and_si512(top[I], high);
        } else {
          u.code[4 * H + I] = pick(high, shift<4>(top[I]), bottom[I]);
          u.code[4 * H + I + 2] = pick(high, top[I], shift<-4>(bottom[I]));
        }
      });
    });
  }
  return u;
}

// Two lines into L2. A single stream gains a tenth from this second, longer reach; several at once lose a fifth.
inline void prefetch_far(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(p + 64), _MM_HINT_T1);
}

// The streams of a matrix run in step; each is prefetched so far ahead that together they cover the latency.
template <int BITS> inline void prefetch_unit(const Matrix& w, int64_t unit) {
  prefetch(w.base + unit * 128);
  prefetch(w.base + unit * 128 + 64);
  for (int p = 0; p < BITS - kBaseBits; ++p) prefetch(w.planes[p] + unit * 64);
}

// ---- the float part: exactly as at KernelTable::matmul -----------------------------------------------------------

inline __m512 floats(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

struct Affine {
  __m512 step, offset; // S and half - Z
  Affine(__m512 step, __m512 offset) : step(step), offset(offset) {}
  Affine(const uint8_t* p, __m512 half) : step(floats(p)), offset(_mm512_sub_ps(half, floats(p + kTileRows))) {}

  __m512 add(__m512 acc, __m512i dot, __m512 sum, __m512 scale) const {
    const __m512 n = _mm512_fmadd_ps(offset, sum, _mm512_cvtepi32_ps(dot)); // exact, so fusing changes nothing
    return _mm512_add_ps(acc, _mm512_mul_ps(_mm512_mul_ps(scale, n), step));
  }
};

inline __mmask16 row_mask(const Matrix& w, int64_t tile) {
  const int64_t rows = w.shape.rows - tile * kTileRows;
  return rows >= kTileRows ? __mmask16(0xFFFF) : __mmask16((1u << rows) - 1);
}
inline __m512 half_of(int bits) { return _mm512_set1_ps(float(1 << (8 - bits)) * 0.5f); }

// ---- few tokens: bound by memory ---------------------------------------------------------------------------------

// One tile and T tokens from i0 on.
template <int BITS, int T>
void multiply_few(const Matrix& w, const Activations& x, int64_t i0, int64_t tile, float* y, int64_t ldy) {
  constexpr int P = kPlaces<BITS>;
  constexpr int kChains = P * T >= 8 ? 1 : P * T >= 4 || P == 2 ? 2 : 4; // per place, against vpdpbusd's latency
  const int group = w.shape.group, units = group / 32;
  const int64_t groups = w.shape.groups(), stride = groups * group;
  const __m512 half = half_of(BITS);
  Registers<__m512, T> acc;
  unrolled<T>([&](auto i) __attribute__((always_inline)) { acc.template at<decltype(i)::value>() = _mm512_setzero_ps(); });
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t block = tile * groups + g;
    const int8_t* q = x.q + i0 * stride + g * group;
    Registers<__m512i, T * P * kChains> dot;
    unrolled<T * P * kChains>([&](auto k) __attribute__((always_inline)) { dot.template at<decltype(k)::value>() = _mm512_setzero_si512(); });
    for (int u = 0; u < units; ++u, q += 32) {
      const int64_t at = block * units + u;
      prefetch_unit<BITS>(w, at + kAheadBytes / 128);
      if constexpr (BITS == 2) prefetch_far(w.base + at * 128 + 5 * kAheadBytes);
      const Unit unit = unit_codes<BITS>(w, at);
      unrolled<8 * T>([&](auto k) __attribute__((always_inline)) {
        constexpr int F = decltype(k)::value / T, I = decltype(k)::value % T;
        constexpr int kChain = P == 1 ? F % kChains : F / 4 % kChains; // the registers of one place take turns
        add_products(dot.template at<(I * P + place<BITS>(F)) * kChains + kChain>(), unit.code[F], q + I * stride + 4 * F);
      });
    }
    const uint8_t* scales = w.affine + block * 2 * kTileRows;
    prefetch(scales + kAheadBytes / 4);
    const Affine affine(scales, half);
    unrolled<T>([&](auto index) __attribute__((always_inline)) {
      constexpr int I = decltype(index)::value;
      const int64_t at = (i0 + I) * groups + g;
      __m512i sum = _mm512_setzero_si512();
      unrolled<P * kChains>([&](auto k) __attribute__((always_inline)) {
        constexpr int L = raise<BITS>(decltype(k)::value / kChains);
        sum = _mm512_add_epi32(sum, _mm512_slli_epi32(dot.template at<I * P * kChains + decltype(k)::value>(), L));
      });
      __m512& total = acc.template at<I>();
      total = affine.add(total, sum, _mm512_cvtepi32_ps(_mm512_set1_epi32(x.sum[at])), _mm512_set1_ps(x.scale[at]));
    });
  }
  const __m512 scale = _mm512_loadu_ps(w.row_scale + tile * kTileRows);
  const __mmask16 rows = row_mask(w, tile);
  unrolled<T>([&](auto i) __attribute__((always_inline)) {
    constexpr int I = decltype(i)::value;
    _mm512_mask_storeu_ps(y + (i0 + I) * ldy + tile * kTileRows, rows, _mm512_mul_ps(acc.template at<I>(), scale));
  });
}

// Tokens in equal parts that fit the registers; a tile that was read from memory stays in L1 for the next part.
template <int BITS>
void multiply_registers(const Matrix& w, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  using Few = void (*)(const Matrix&, const Activations&, int64_t, int64_t, float*, int64_t);
  constexpr Few few[] = {multiply_few<BITS, 1>, multiply_few<BITS, 2>, multiply_few<BITS, 3>, multiply_few<BITS, 4>,
                         multiply_few<BITS, BITS == 2 ? 4 : 5>, multiply_few<BITS, BITS == 2 ? 4 : 6>};
  constexpr int64_t kMost = BITS == 2 ? 4 : 6;
  const int64_t parts = (x.m + kMost - 1) / kMost;
  for (int64_t tile = tile0; tile < tile1; ++tile)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t i0 = x.m * part / parts, i1 = x.m * (part + 1) / parts;
      few[i1 - i0 - 1](w, x, i0, tile, y, ldy);
    }
}

// ---- many tokens: bound by vpdpbusd ------------------------------------------------------------------------------

// Columns [group0, group0 + count) of one or two tiles, unpacked: codes left-aligned in register order, step and half - Z as
// floats; and the sums of all tokens so far, which would fall into the same few cache sets if they were kept in y.
struct Panel {
  alignas(64) uint8_t codes[2][kTileRows * kPanelCols];
  alignas(64) float affine[2][kPanelGroups][2][kTileRows];
  alignas(64) float sums[kPanelTokens][2][kTileRows];
  int64_t group0, count;
  int group;

  template <int BITS> void fill(const Matrix& w, int side, int64_t tile) {
    const int64_t block = tile * w.shape.groups() + group0, units = group / 32;
    uint8_t* out = codes[side];
    for (int64_t unit = block * units; unit < (block + count) * units; ++unit, out += 512) {
      const Unit u = unit_codes<BITS>(w, unit);
      unrolled<8>([&](auto f) __attribute__((always_inline)) {
        constexpr int F = decltype(f)::value, L = raise<BITS>(place<BITS>(F));
        _mm512_store_si512(out + 64 * F, shift<L>(u.code[F])); // no bit leaves its byte
      });
    }
    for (int64_t g = 0; g < count; ++g) {
      const Affine a(w.affine + (block + g) * 2 * kTileRows, half_of(BITS));
      _mm512_store_ps(affine[side][g][0], a.step);
      _mm512_store_ps(affine[side][g][1], a.offset);
    }
  }
};

// S tiles side by side, T tokens from i0 on.
template <int S, int T> void multiply_panel(Panel& p, const Activations& x, int64_t groups, int64_t i0) {
  constexpr int kChains = S * T >= 8 ? 1 : S * T >= 4 ? 2 : 4; // sums in flight, against vpdpbusd's latency
  const int64_t stride = groups * p.group;
  Registers<__m512, S * T> acc;
  unrolled<S * T>([&](auto k) __attribute__((always_inline)) {
    constexpr int K = decltype(k)::value;
    acc.template at<K>() = p.group0 ? _mm512_load_ps(p.sums[i0 + K % T][K / T]) : _mm512_setzero_ps();
  });
  const int8_t* q = x.q + i0 * stride + p.group0 * p.group;
  const uint8_t* codes = p.codes[0];
  const int32_t* sum = x.sum + i0 * groups + p.group0;
  const float* scale = x.scale + i0 * groups + p.group0;
  for (int64_t g = 0; g < p.count; ++g) {
    Registers<__m512i, S * T * kChains> dot;
    unrolled<S * T * kChains>([&](auto k) __attribute__((always_inline)) { dot.template at<decltype(k)::value>() = _mm512_setzero_si512(); });
    for (int j = p.group; j > 0; j -= 16, q += 16, codes += 256)
      unrolled<4>([&](auto f) __attribute__((always_inline)) {
        constexpr int F = decltype(f)::value;
        Registers<__m512i, S> code;
        unrolled<S>([&](auto a) __attribute__((always_inline)) {
          code.template at<decltype(a)::value>() = _mm512_load_si512(codes + decltype(a)::value * int(sizeof p.codes[0]) + 64 * F);
        });
        unrolled<T>([&](auto index) __attribute__((always_inline)) {
          constexpr int I = decltype(index)::value;
          const __m512i v = four(q + I * stride + 4 * F);
          unrolled<S>([&](auto a) __attribute__((always_inline)) {
            constexpr int A = decltype(a)::value;
            add_products(dot.template at<(A * T + I) * kChains + F % kChains>(), code.template at<A>(), v);
          });
        });
      });
    unrolled<S>([&](auto side) __attribute__((always_inline)) {
      constexpr int A = decltype(side)::value;
      const Affine affine(_mm512_load_ps(p.affine[A][g][0]), _mm512_load_ps(p.affine[A][g][1]));
      unrolled<T>([&](auto index) __attribute__((always_inline)) {
        constexpr int I = decltype(index)::value, K = A * T + I;
        __m512i total = dot.template at<K * kChains>();
        if constexpr (kChains >= 2) total = _mm512_add_epi32(total, dot.template at<K * kChains + 1>());
        if constexpr (kChains == 4)
          total = _mm512_add_epi32(total, _mm512_add_epi32(dot.template at<K * kChains + 2>(), dot.template at<K * kChains + 3>()));
        const __m512 sums = _mm512_cvtepi32_ps(_mm512_set1_epi32(sum[I * groups + g]));
        acc.template at<K>() = affine.add(acc.template at<K>(), total, sums, _mm512_set1_ps(scale[I * groups + g]));
      });
    });
  }
  unrolled<S * T>([&](auto k) __attribute__((always_inline)) {
    constexpr int K = decltype(k)::value;
    _mm512_store_ps(p.sums[i0 + K % T][K / T], acc.template at<K>());
  });
}

// All of x with tiles [tile, tile + S); x.m is at most kPanelTokens.
template <int BITS, int S>
void multiply_tiles(const Matrix& w, const Activations& x, Panel& p, int64_t tile, float* y, int64_t ldy) {
  const int64_t groups = w.shape.groups(), most = kPanelCols / w.shape.group, units = w.shape.group / 32;
  for (p.group0 = 0; p.group0 < groups; p.group0 += most) {
    p.count = least(most, groups - p.group0);
    const bool last = p.group0 + p.count == groups;
    for (int a = 0; a < S; ++a) p.fill<BITS>(w, a, tile + a);
    // What is unpacked next comes in while this is multiplied, some lines with each step: all at once they would queue up.
    const int64_t next = last ? (tile + S) * groups : tile * groups + p.group0 + p.count;
    const int64_t per = p.count * units, ahead = S * per;
    int64_t i = 0, asked = 0;
    const auto take = [&](auto tokens) __attribute__((always_inline)) {
      constexpr int T = decltype(tokens)::value;
      for (; i + T <= x.m; i += T) {
        for (const int64_t upto = ahead * (i + T) / x.m; asked < upto; ++asked)
          prefetch_unit<BITS>(w, (next + asked / per * groups) * units + asked % per);
        multiply_panel<S, T>(p, x, groups, i);
      }
    };
    take(Index<6>{});
    take(Index<4>{});
    take(Index<3>{});
    take(Index<2>{});
    take(Index<1>{});
  }
  for (int a = 0; a < S; ++a) {
    const __m512 scale = _mm512_loadu_ps(w.row_scale + (tile + a) * kTileRows);
    const __mmask16 rows = row_mask(w, tile + a);
    for (int64_t i = 0; i < x.m; ++i)
      _mm512_mask_storeu_ps(y + i * ldy + (tile + a) * kTileRows, rows, _mm512_mul_ps(_mm512_load_ps(p.sums[i][a]), scale));
  }
}

template <int BITS>
void multiply_many(const Matrix& w, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  Panel p;
  p.group = w.shape.group;
  int64_t tile = tile0;
  for (; tile + 2 <= tile1; tile += 2) multiply_tiles<BITS, 2>(w, x, p, tile, y, ldy);
  if (tile < tile1) multiply_tiles<BITS, 1>(w, x, p, tile, y, ldy);
}

template <int BITS>
void multiply(const Matrix& w, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  (x.m <= few_tokens(BITS) ? multiply_registers<BITS> : multiply_many<BITS>)(w, x, tile0, tile1, y, ldy);
}

void matmul(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  constexpr void (*by_width[])(const Matrix&, const Activations&, int64_t, int64_t, float*, int64_t) = {
      multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>, multiply<7>, multiply<8>};
  const int64_t groups = w.shape.groups(), stride = groups * w.shape.group;
  const int64_t parts = (x.m + kPanelTokens - 1) / kPanelTokens;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t i = x.m * part / parts, m = x.m * (part + 1) / parts - i;
    by_width[bits - kBaseBits](w, {x.q + i * stride, x.scale + i * groups, x.sum + i * groups, m}, tile0, tile1, y + i * ldy, ldy);
  }
}

const char* variant(int bits, int64_t m) {
  if (m > few_tokens(bits)) return "codes unpacked in L1, 2 tiles x 6 tokens";
  return bits == 2 ? "2-bit fields in registers" : bits <= 4 ? "nibbles in registers" : "whole codes in registers";
}

// ---- attention -----------------------------------------------------------------------------------------------------

inline __mmask16 first(int64_t n) { return n >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << n) - 1); }
inline __m512 halves(const uint16_t* p, __mmask16 k) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(k, p)); }
inline __m512 signed_bytes(const int8_t* p, __mmask16 k) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(k, p)));
}

// N queries and S tiles of keys in flight: their sums are independent, so that the latency of an addition does not bind.
template <int N, int S>
void scores_f16_of(const uint16_t* keys, int64_t head_dim, const ConstRows& q, const Rows& out) {
  __m512 acc[N][S];
  unrolled<N * S>([&](auto k) { acc[k.value / S][k.value % S] = _mm512_setzero_ps(); });
  for (int64_t d = 0; d < head_dim; ++d) {
    __m512 key[S];
    unrolled<S>([&](auto s) { key[s.value] = halves(keys + (s.value * head_dim + d) * kKeyTile, 0xFFFF); });
    unrolled<N>([&](auto i) __attribute__((always_inline)) {
      constexpr int I = decltype(i)::value;
      const __m512 x = _mm512_set1_ps(q.data[I * q.stride + d]);
      unrolled<S>([&](auto s) { acc[I][s.value] = _mm512_add_ps(acc[I][s.value], _mm512_mul_ps(x, key[s.value])); });
    });
  }
  unrolled<N * S>([&](auto k) { _mm512_storeu_ps(out.data + k.value / S * out.stride + k.value % S * kKeyTile, acc[k.value / S][k.value % S]); });
}

template <int N, int S>
void scores_q8_of(const uint8_t* keys, const float* key_scale, int64_t head_dim, const int8_t* q, int64_t q_stride, const Rows& out) {
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
        keys + t * head_dim * kKeyTile, head_dim, {q.data + i * q.stride, q.stride}, {scores.data + i * scores.stride + t * kKeyTile, scores.stride});
  });
}

void scores_q8(const uint8_t* keys, const float* key_scale, int64_t tiles, int64_t head_dim, const int8_t* q,
               int64_t q_stride, int64_t n, Rows scores) {
  cut_scores(n, tiles, [&](auto queries, auto side, int64_t i, int64_t t) {
    scores_q8_of<decltype(queries)::value, decltype(side)::value>(
        keys + t * head_dim * kKeyTile, key_scale + t * kKeyTile, head_dim, q + i * q_stride, q_stride,
        {scores.data + i * scores.stride + t * kKeyTile, scores.stride});
  });
}

// N queries and up to 16 R elements of the head, whose sums stay in registers. value(j, d, mask) are 16 floats, weight(i, j)
// what query i gives to key j.
template <int N, int R, class V, class W>
inline __attribute__((always_inline)) void mix_of(int64_t count, int64_t head_dim, int64_t i0, int64_t d0, const Rows& out, V&& value, W&& weight) {
  __mmask16 mask[R];
  __m512 acc[N][R];
  unrolled<R>([&](auto r) { mask[r.value] = d0 + 16 * r.value < head_dim ? first(head_dim - d0 - 16 * r.value) : __mmask16(0); });
  float* y = out.data + i0 * out.stride + d0;
  unrolled<N * R>([&](auto k) {
    constexpr int I = decltype(k)::value / R, E = decltype(k)::value % R;
    acc[I][E] = _mm512_maskz_loadu_ps(mask[E], y + I * out.stride + 16 * E);
  });
  for (int64_t j = 0; j < count; ++j) {
    __m512 v[R];
    unrolled<R>([&](auto r) { v[r.value] = value(j, d0 + 16 * r.value, mask[r.value]); });
    unrolled<N>([&](auto i) __attribute__((always_inline)) {
      constexpr int I = decltype(i)::value;
      const __m512 p = _mm512_set1_ps(weight(i0 + I, j));
      unrolled<R>([&](auto r) { acc[I][r.value] = _mm512_add_ps(acc[I][r.value], _mm512_mul_ps(p, v[r.value])); });
    });
  }
  unrolled<N * R>([&](auto k) {
    constexpr int I = decltype(k)::value / R, E = decltype(k)::value % R;
    _mm512_mask_storeu_ps(y + I * out.stride + 16 * E, mask[E], acc[I][E]);
  });
}

template <class V, class W> inline void mix(int64_t count, int64_t head_dim, int64_t n, const Rows& out, V&& value, W&& weight) {
  int64_t i = 0;
  const auto take = [&](auto queries, auto registers) {
    constexpr int N = decltype(queries)::value, R = decltype(registers)::value;
    for (; i + N <= n; i += N)
      for (int64_t d = 0; d < head_dim; d += 16 * R) mix_of<N, R>(count, head_dim, i, d, out, value, weight);
  };
  take(Index<8>{}, Index<2>{});
  take(Index<4>{}, Index<4>{});
  take(Index<2>{}, Index<8>{});
  take(Index<1>{}, Index<8>{});
}

void mix_f16(const uint16_t* values, int64_t count, int64_t head_dim, ConstRows p, int64_t n, Rows out) {
  mix(count, head_dim, n, out, [&](int64_t j, int64_t d, __mmask16 k) { return halves(values + j * head_dim + d, k); },
      [&](int64_t i, int64_t j) { return p.data[i * p.stride + j]; });
}

void mix_q8(const int8_t* values, const float* value_scale, int64_t count, int64_t head_dim, ConstRows p, int64_t n, Rows out) {
  constexpr int64_t kValues = 64;
  float weight[kQueries][kValues]; // multiplied once, not for every part of the head; and a broadcast from memory is free
  for (int64_t j0 = 0; j0 < count; j0 += kValues, values += kValues * head_dim) {
    const int64_t rows = least(kValues, count - j0);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < rows; ++j) weight[i][j] = p.data[i * p.stride + j0 + j] * value_scale[j0 + j];
    mix(rows, head_dim, n, out, [&](int64_t j, int64_t d, __mmask16 k) { return signed_bytes(values + j * head_dim + d, k); },
        [&](int64_t i, int64_t j) { return weight[i][j]; });
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

const KernelTable kAvx512Table = {"avx512", quantize,    matmul,  variant,  dot_f32, scores_f16, scores_q8, mix_f16,
                                  mix_q8,   sum_squares, exp_sum, silu_mul, to_f16,  to_f32,     read_bytes};

} // namespace d2moe
