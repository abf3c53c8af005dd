// What the files of the AVX2 table share. Only files compiled for AVX2 may include this.
#pragma once
#include "kernels.h"

#include <immintrin.h>
#include <utility>

#define INLINE __attribute__((always_inline)) // also for lambdas, which have no other way to say it

namespace d2moe {
namespace avx2 {

// matmul_avx2.cpp
void matmul(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy);
const char* variant(int bits, int64_t m);

} // namespace avx2

namespace {

template <int N> struct Index { static constexpr int value = N; };
template <class F, int... I> inline INLINE void each(F&& f, std::integer_sequence<int, I...>) {
  (f(Index<I>{}), ...);
}
// Loops whose index is a constant.
template <int N, class F> inline INLINE void unrolled(F&& f) {
  each(f, std::make_integer_sequence<int, N>{});
}

inline __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i four(const int8_t* q) { // four activations in every lane
  int32_t v;
  __builtin_memcpy(&v, q, 4);
  return _mm256_set1_epi32(v);
}
// v += w, in this order: compilers regroup long sums into trees that do not fit the registers.
inline INLINE void add16(__m256i& v, __m256i w) {
  v = _mm256_add_epi16(v, w);
  asm("" : "+x"(v));
}
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
// GCC takes a function that does nothing but prefetch for one without effect and drops its calls, unless they are inlined before.
inline INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
inline INLINE void prefetch_far(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
inline __m256 halves(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

} // namespace
} // namespace d2moe
