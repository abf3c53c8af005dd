// Nested products with AVX2. A register pair is 16 rows x 4 columns. vpmaddubsw adds pairs in saturating int16, so codes are
// right-aligned and at most 7 bits there; 8-bit codes are two nibbles with a product each. The integers are the same.
#include "kernels_avx2.h"

namespace d2moe {
namespace {

constexpr int64_t kChunkBytes = 16 << 10; // unpacked codes kept in L1 between two passes over the tokens
constexpr int64_t kNearUnits = 8;         // software prefetch, in 32 columns of a tile: hardware prefetchers stop at 4 KiB
constexpr int64_t kFarUnits = 64;
constexpr int kFewTokens = 4;             // up to here codes are used straight from registers

// ---- unpacking -------------------------------------------------------------------------------------------------

// Bits `mask` of v after a shift by N to the right (left if negative); bits that cross a byte are masked away.
template <int N> inline __m256i bits_at(__m256i v, int mask) {
  if constexpr (N > 0) v = _mm256_srli_epi16(v, N);
  if constexpr (N < 0) v = _mm256_slli_epi16(v, -N);
  return _mm256_and_si256(v, _mm256_set1_epi8(char(mask)));
}
inline __m256i either(__m256i a, __m256i b) { return _mm256_or_si256(a, b); }

// Four registers as 2-bit fields, as in a word of the base; and as nibbles, the low ones registers 1 and 0.
struct Fields { __m256i word[2]; };
struct Nibbles { __m256i odd, even; }; // registers 3 and 1, 2 and 0

static_assert(kPlaneBit[0] == 0 && kPlaneBit[3] == 6 && kPlaneBit[4] == 1 && kPlaneBit[7] == 7, "the shifts below");

// Two planes: the upper bits of the fields, the lower ones.
inline Fields fields(__m256i upper, __m256i lower) {
  return {{either(bits_at<-1>(upper, 0xAA), bits_at<0>(lower, 0x55)), either(bits_at<0>(upper, 0xAA), bits_at<1>(lower, 0x55))}};
}
inline Nibbles nibbles(__m256i upper, __m256i lower) {
  return {either(bits_at<0>(upper, 0xCC), bits_at<2>(lower, 0x33)), either(bits_at<-2>(upper, 0xCC), bits_at<0>(lower, 0x33))};
}
// Three bits in the low end of each nibble: fields of word W and a plane.
template <int W> inline Nibbles threes(__m256i upper, __m256i plane) {
  return {either(bits_at<1>(upper, 0x66), bits_at<2 + W>(plane, 0x11)), either(bits_at<-1>(upper, 0x66), bits_at<W>(plane, 0x11))};
}

// Register F of four, moved LEFT bits up from the low end of its byte, WIDTH bits wide.
template <int F, int LEFT, int WIDTH> inline __m256i nibble(const Nibbles& n) {
  return bits_at<(F >= 2 ? 4 : 0) - LEFT>(F % 2 ? n.odd : n.even, ((1 << WIDTH) - 1) << LEFT);
}

// A register's codes as right-aligned numbers; at 8 bits the upper nibbles, and the lower ones in `low`.
struct Code { __m256i top, low; };

// What all registers of a unit share; `side` is 0 for rows 0-7, 32 for rows 8-15.
template <int BITS> struct Unit {
  __m256i base[2], single;
  Fields f34, f56, f78;
  Nibbles top[2], low[2];

  INLINE Unit(const Matrix& w, int64_t unit, int64_t side) {
    const auto plane = [&](int bit) INLINE { return load(w.planes[bit - 3] + unit * 64 + side); };
    if constexpr (BITS >= 4) f34 = fields(plane(3), plane(4));
    if constexpr (BITS >= 6) f56 = fields(plane(5), plane(6));
    if constexpr (BITS == 8) f78 = fields(plane(7), plane(8));
    else if constexpr (BITS % 2) single = plane(BITS);
    unrolled<2>([&](auto word) INLINE {
      constexpr int W = decltype(word)::value;
      base[W] = load(w.base + unit * 128 + 64 * W + side);
      if constexpr (BITS == 3) top[W] = threes<W>(base[W], single);
      if constexpr (BITS >= 4) top[W] = nibbles(base[W], f34.word[W]);
      if constexpr (BITS == 7) low[W] = threes<W>(f56.word[W], single);
      if constexpr (BITS == 8) low[W] = nibbles(f56.word[W], f78.word[W]);
    });
  }

  template <int F, bool SPREAD = false> INLINE Code code() const {
    constexpr int W = F / 4, I = F % 4;
    Code c{};
    if constexpr (BITS == 2 && SPREAD) c.top = bits_at<I / 2 * 4>(base[W], I % 2 ? 12 : 3);
    else if constexpr (BITS == 2) c.top = bits_at<2 * I>(base[W], 3);
    if constexpr (BITS == 3) c.top = nibble<I, 0, 3>(top[W]);
    if constexpr (BITS == 4 || BITS == 8) c.top = nibble<I, 0, 4>(top[W]);
    if constexpr (BITS == 5) c.top = either(nibble<I, 1, 4>(top[W]), bits_at<kPlaneBit[F]>(single, 1));
    if constexpr (BITS == 6) c.top = either(nibble<I, 2, 4>(top[W]), bits_at<2 * I>(f56.word[W], 3));
    if constexpr (BITS == 7) c.top = either(nibble<I, 3, 4>(top[W]), nibble<I, 0, 3>(low[W]));
    if constexpr (BITS == 8) c.low = nibble<I, 0, 4>(low[W]);
    return c;
  }
};

// The streams of a matrix run in step; each is prefetched so far ahead that together they cover the latency. Far ones go
// to L2 only, because too few misses of L1 can be under way; near ones then come from there.
template <int BITS, bool FAR> inline INLINE void prefetch_unit(const Matrix& w, int64_t unit) {
  const auto line = [](const uint8_t* p) INLINE {
    if constexpr (FAR) prefetch_far(p);
    else prefetch(p);
  };
  line(w.base + unit * 128);
  line(w.base + unit * 128 + 64);
  for (int p = 0; p < BITS - kBaseBits; ++p) line(w.planes[p] + unit * 64);
}

// ---- products --------------------------------------------------------------------------------------------------

// Registers whose products fit into one int16: pairs of (2^BITS - 1) * 128.
constexpr int depth(int bits) { return bits == 2 ? 32 : bits == 3 ? 16 : bits == 5 ? 4 : bits == 6 ? 2 : bits == 7 ? 1 : 8; }

// The dots of 8 rows with T tokens, counted as those of left-aligned codes. SPREAD, for 2 bits: codes of odd registers come
// times four.
template <int BITS, int T, bool SPREAD = false> struct Dots {
  static constexpr bool kTwo = BITS == 8 || SPREAD; // two sums, to be weighed differently
  static constexpr int kDepth = SPREAD ? 16 : depth(BITS);
  static constexpr int kTop = BITS == 8 ? 16 : 1 << (8 - BITS), kLow = BITS == 8 ? 1 : 1 << (6 - BITS);
  __m256i total[T], top[T], low[T];

  // Register F of a unit, token I.
  template <int F, int I> INLINE void add(const Code& c, __m256i q) {
    const auto put = [](__m256i& sum, __m256i product) INLINE {
      if constexpr (kDepth <= 8 && F % kDepth == 0) sum = product;
      else add16(sum, product);
    };
    if constexpr (SPREAD) {
      put(F % 2 ? low[I] : top[I], _mm256_maddubs_epi16(c.top, q));
    } else {
      put(top[I], _mm256_maddubs_epi16(c.top, q));
      if constexpr (BITS == 8) put(low[I], _mm256_maddubs_epi16(c.low, q));
    }
    if constexpr (kDepth <= 8 && (F + 1) % kDepth == 0) flush<I>();
  }
  template <int I> INLINE void flush() {
    total[I] = _mm256_add_epi32(total[I], _mm256_madd_epi16(top[I], _mm256_set1_epi16(kTop)));
    if constexpr (kTwo) total[I] = _mm256_add_epi32(total[I], _mm256_madd_epi16(low[I], _mm256_set1_epi16(kLow)));
  }
  // unit(u) adds the products of unit u of a group.
  template <class F> INLINE void add_units(int units, F&& unit) {
    unrolled<T>([&](auto i) INLINE { total[i.value] = _mm256_setzero_si256(); });
    if constexpr (kDepth <= 8) {
      for (int u = 0; u < units; ++u) unit(u);
    } else {
      for (int u = 0; u < units;) {
        unrolled<T>([&](auto i) INLINE { top[i.value] = low[i.value] = _mm256_setzero_si256(); });
        for (const int end = u + kDepth / 8 < units ? u + kDepth / 8 : units; u < end; ++u) unit(u);
        unrolled<T>([&](auto i) INLINE { flush<decltype(i)::value>(); });
      }
    }
  }
};

// The float part, exactly as at KernelTable::matmul, for 8 rows of a block.
struct Affine {
  __m256 step, offset; // offset: half - zero

  static Affine of(const uint8_t* p, float half) {
    const auto floats = [](const uint8_t* b) {
      return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(b))));
    };
    return {floats(p), _mm256_sub_ps(_mm256_set1_ps(half), floats(p + kTileRows))};
  }
  __m256 add(__m256 acc, __m256i dot, int32_t sum, float scale) const {
    const __m256 n = _mm256_fmadd_ps(offset, _mm256_cvtepi32_ps(_mm256_set1_epi32(sum)), _mm256_cvtepi32_ps(dot)); // exact
    return _mm256_add_ps(acc, _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(scale), n), step));
  }
};

constexpr float half_cell(int bits) { return bits == 8 ? 0.5f : float(1 << (7 - bits)); }

inline void put_rows(float* y, const float* acc, const float* row_scale, int64_t rows) {
  if (rows >= kTileRows) {
    for (int r = 0; r < kTileRows; r += 8) _mm256_storeu_ps(y + r, _mm256_mul_ps(_mm256_load_ps(acc + r), _mm256_loadu_ps(row_scale + r)));
  } else {
    for (int64_t r = 0; r < rows; ++r) y[r] = acc[r] * row_scale[r];
  }
}

// T tokens, straight from registers: bound by memory. A GROUP that is known (not 0) leaves no loop over its units; one token
// at 2 bits gains a sixth from that.
template <int BITS, int T, int GROUP>
void multiply_few(const Matrix& w, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  constexpr bool kSpread = BITS == 2 && T == 1; // with more tokens the second sum costs more than the shifts
  const int group = GROUP ? GROUP : w.shape.group, units = group / 32;
  const int64_t groups = w.shape.groups(), stride = groups * group;
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    alignas(32) float acc[T][kTileRows] = {};
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t block = tile * groups + g;
      const int8_t* q = x.q + g * group;
      Dots<BITS, 2 * T, kSpread> dots;
      dots.add_units(units, [&](int u) INLINE {
        prefetch_unit<BITS, false>(w, block * units + u + kNearUnits);
        prefetch_unit<BITS, true>(w, block * units + u + kFarUnits);
        const Unit<BITS> upper(w, block * units + u, 0), lower(w, block * units + u, 32);
        unrolled<8>([&](auto reg) INLINE {
          constexpr int F = decltype(reg)::value;
          const Code code[2] = {upper.template code<F, kSpread>(), lower.template code<F, kSpread>()};
          unrolled<T>([&](auto i) INLINE {
            constexpr int I = decltype(i)::value;
            const __m256i v = four(q + I * stride + 32 * u + 4 * F);
            dots.template add<F, 2 * I>(code[0], v);
            dots.template add<F, 2 * I + 1>(code[1], v);
          });
        });
      });
      const uint8_t* scales = w.affine + block * 2 * kTileRows;
      prefetch(scales + kNearUnits * 2 * kTileRows);
      const Affine affine[2] = {Affine::of(scales, half_cell(BITS)), Affine::of(scales + 8, half_cell(BITS))};
      unrolled<2 * T>([&](auto k) INLINE {
        constexpr int K = decltype(k)::value, I = K / 2, S = K % 2;
        float* a = acc[I] + 8 * S;
        _mm256_store_ps(a, affine[S].add(_mm256_load_ps(a), dots.total[K], x.sum[I * groups + g], x.scale[I * groups + g]));
      });
    }
    const int64_t row0 = tile * kTileRows;
    for (int i = 0; i < T; ++i) put_rows(y + i * ldy + row0, acc[i], w.row_scale + row0, w.shape.rows - row0);
  }
}

// ---- many tokens: bound by vpmaddubsw --------------------------------------------------------------------------

// A run of groups of one tile: codes [units, 8, 64], at 8 bits [units, 8, 2, 64]; the affine part as floats.
template <int BITS> struct Chunk {
  static constexpr int kWords = BITS == 8 ? 2 : 1;
  alignas(64) uint8_t codes[kChunkBytes * kWords];
  Affine affine[kChunkBytes / (kTileRows * 32)][2];
  int64_t group0, count;
  int group;

  static int64_t most(int group) { return kChunkBytes / (kTileRows * group); }

  void unpack(const Matrix& w, int64_t tile, int64_t first, int64_t n) {
    group0 = first, count = n, group = w.shape.group;
    const int64_t block = tile * w.shape.groups() + first, units = group / 32, unit0 = block * units;
    uint8_t* out = codes;
    for (int64_t u = unit0; u < unit0 + n * units; ++u, out += 512 * kWords) {
      prefetch_unit<BITS, true>(w, u + n * units); // the next chunk comes in while this one is multiplied
      for (int side = 0; side < 64; side += 32) {
        const Unit<BITS> unit(w, u, side);
        unrolled<8>([&](auto reg) INLINE {
          constexpr int F = decltype(reg)::value;
          const Code c = unit.template code<F>();
          uint8_t* to = out + F * 64 * kWords + side;
          _mm256_store_si256(reinterpret_cast<__m256i*>(to), c.top);
          if constexpr (BITS == 8) _mm256_store_si256(reinterpret_cast<__m256i*>(to + 64), c.low);
        });
      }
    }
    for (int64_t g = 0; g < n; ++g)
      for (int side = 0; side < 2; ++side)
        affine[g][side] = Affine::of(w.affine + (block + g) * 2 * kTileRows + 8 * side, half_cell(BITS));
  }
};

// Adds T tokens' sums over a chunk to acc [T, 16].
template <int BITS, int T> void multiply_chunk(const Chunk<BITS>& c, const Activations& x, int64_t groups, int64_t i0, float* acc) {
  constexpr int kWords = Chunk<BITS>::kWords;
  const int64_t stride = groups * c.group;
  const int units = c.group / 32;
  const uint8_t* codes = c.codes;
  const int8_t* q = x.q + i0 * stride + c.group0 * c.group;
  for (int64_t g = 0; g < c.count; ++g) {
    Dots<BITS, 2 * T> dots; // both sides
    dots.add_units(units, [&](int) INLINE {
      unrolled<8>([&](auto reg) INLINE {
        constexpr int F = decltype(reg)::value;
        const uint8_t* p = codes + F * 64 * kWords;
        Code code[2];
        for (int side = 0; side < 2; ++side) {
          code[side].top = load(p + 32 * side);
          if constexpr (BITS == 8) code[side].low = load(p + 64 + 32 * side);
        }
        unrolled<T>([&](auto i) INLINE {
          constexpr int I = decltype(i)::value;
          const __m256i v = four(q + I * stride + 4 * F);
          dots.template add<F, 2 * I>(code[0], v);
          dots.template add<F, 2 * I + 1>(code[1], v);
        });
      });
      codes += 512 * kWords;
      q += 32;
    });
    unrolled<2 * T>([&](auto k) INLINE {
      constexpr int I = decltype(k)::value / 2, S = decltype(k)::value % 2;
      const int64_t at = (i0 + I) * groups + c.group0 + g;
      float* a = acc + I * kTileRows + 8 * S;
      _mm256_store_ps(a, c.affine[g][S].add(_mm256_load_ps(a), dots.total[2 * I + S], x.sum[at], x.scale[at]));
    });
  }
}

template <int BITS>
void multiply_many(const Matrix& w, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  constexpr int kTokens = BITS == 8 ? 3 : 4;
  constexpr int64_t kBatch = 64;
  const int64_t groups = w.shape.groups(), stride = groups * w.shape.group, most = Chunk<BITS>::most(w.shape.group);
  Chunk<BITS> c;
  alignas(32) float acc[kBatch][kTileRows];
  for (int64_t i0 = 0; i0 < x.m; i0 += kBatch) {
    const int64_t m = least(kBatch, x.m - i0);
    const Activations part{x.q + i0 * stride, x.scale + i0 * groups, x.sum + i0 * groups, m};
    for (int64_t tile = tile0; tile < tile1; ++tile) {
      __builtin_memset(acc, 0, sizeof acc[0] * size_t(m));
      for (int64_t g = 0; g < groups; g += most) {
        c.unpack(w, tile, g, least(most, groups - g));
        int64_t i = 0;
        for (; i + kTokens <= m; i += kTokens) multiply_chunk<BITS, kTokens>(c, part, groups, i, acc[i]);
        for (; i + 2 <= m; i += 2) multiply_chunk<BITS, 2>(c, part, groups, i, acc[i]);
        for (; i < m; ++i) multiply_chunk<BITS, 1>(c, part, groups, i, acc[i]);
      }
      const int64_t row0 = tile * kTileRows;
      for (int64_t i = 0; i < m; ++i) put_rows(y + (i0 + i) * ldy + row0, acc[i], w.row_scale + row0, w.shape.rows - row0);
    }
  }
}

using Multiply = void (*)(const Matrix&, const Activations&, int64_t, int64_t, float*, int64_t);

template <int BITS> Multiply choose(int64_t m, int group) {
  constexpr Multiply few[] = {multiply_few<BITS, 1, 0>, multiply_few<BITS, 2, 0>, multiply_few<BITS, 3, 0>, multiply_few<BITS, 4, 0>};
  if (m == 1 && group == 64) return multiply_few<BITS, 1, 64>;
  if (m == 1 && group == 128) return multiply_few<BITS, 1, 128>;
  return m <= kFewTokens ? few[m - 1] : multiply_many<BITS>;
}

} // namespace

void avx2::matmul(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy) {
  constexpr Multiply (*by_width[])(int64_t, int) = {choose<2>, choose<3>, choose<4>, choose<5>, choose<6>, choose<7>, choose<8>};
  by_width[bits - kBaseBits](x.m, w.shape.group)(w, x, tile0, tile1, y, ldy);
}

const char* avx2::variant(int, int64_t m) { return m <= kFewTokens ? "codes in registers" : "codes in L1"; }

} // namespace d2moe
