// Nested products with AVX-512 and VNNI: a register is 16 rows x 4 columns, one int32 lane a row.
#include "kernels_avx512.h"

namespace d2moe {
namespace {

constexpr int few_tokens(int bits) { return bits <= 4 ? 18 : 4; } // up to here codes are used straight from registers
constexpr int kPanelCols = 512;           // above, the codes of two tiles and so many columns are unpacked once, into L1,
constexpr int kPanelGroups = kPanelCols / 32;
constexpr int kPanelTokens = 192;         // for so many tokens at most, whose activations stay in L2 from tile to tile

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

// The same with the activations in memory; GCC 12 makes of the intrinsic two register moves and a separate broadcast, which
// halves the speed of prompts.
inline __attribute__((always_inline)) void add_products(__m512i& sum, __m512i codes, const int8_t* q) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const int8_t(*)[4]>(q)));
}

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

// How far ahead the base is asked for, in bytes; its planes as many units. Found by trying on Zen 5 (docs/log.md).
template <int BITS> constexpr int64_t kAhead = BITS == 2 ? 1536 : BITS == 3 ? 5120 : BITS == 4 ? 4096 : 2048;

// Two lines into L2. A single stream gains a tenth from this second, longer reach; several at once lose a fifth.
inline __attribute__((always_inline)) void prefetch_far(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(p + 64), _MM_HINT_T1);
}

// The streams of a matrix run in step; each is prefetched so far ahead that together they cover the latency.
template <int BITS> inline __attribute__((always_inline)) void prefetch_unit(const Matrix& w, int64_t unit) {
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
      prefetch_unit<BITS>(w, at + kAhead<BITS> / 128);
      if constexpr (BITS == 2) prefetch_far(w.base + at * 128 + 5 * kAhead<BITS>);
      const Unit unit = unit_codes<BITS>(w, at);
      unrolled<8 * T>([&](auto k) __attribute__((always_inline)) {
        constexpr int F = decltype(k)::value / T, I = decltype(k)::value % T;
        constexpr int kChain = P == 1 ? F % kChains : F / 4 % kChains; // the registers of one place take turns
        add_products(dot.template at<(I * P + place<BITS>(F)) * kChains + kChain>(), unit.code[F], q + I * stride + 4 * F);
      });
    }
    const uint8_t* scales = w.affine + block * 2 * kTileRows;
    prefetch(scales + kAhead<BITS> / 4);
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

} // namespace

void avx512::matmul(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  constexpr void (*by_width[])(const Matrix&, const Activations&, int64_t, int64_t, float*, int64_t) = {
      multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>, multiply<7>, multiply<8>};
  const int64_t groups = w.shape.groups(), stride = groups * w.shape.group;
  const int64_t parts = (x.m + kPanelTokens - 1) / kPanelTokens;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t i = x.m * part / parts, m = x.m * (part + 1) / parts - i;
    by_width[bits - kBaseBits](w, {x.q + i * stride, x.scale + i * groups, x.sum + i * groups, m}, tile0, tile1, y + i * ldy, ldy);
  }
}

const char* avx512::variant(int bits, int64_t m) {
  if (m > few_tokens(bits)) return "codes unpacked in L1, 2 tiles x 6 tokens";
  return bits == 2 ? "2-bit fields in registers" : bits <= 4 ? "nibbles in registers" : "whole codes in registers";
}

} // namespace d2moe
