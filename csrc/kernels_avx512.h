// What the files of the AVX-512 table share. Only files compiled for AVX-512 may include this.
#pragma once
#include "kernels.h"

#include <utility>

#if defined(__GNUC__) && !defined(__clang__) // GCC 12 warns of its own _mm512_undefined_ps (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wignored-attributes" // of __m512 as a template argument; only its alignment matters
#endif
#include <immintrin.h>

namespace d2moe {
namespace avx512 {

// matmul_avx512.cpp
void matmul(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy);
const char* variant(int bits, int64_t m);

} // namespace avx512

namespace {

constexpr int64_t kAheadBytes = 2048; // software prefetch of the base; hardware prefetchers stop at 4 KiB pages

template <int N> struct Index { static constexpr int value = N; };
template <class F, int... I> inline __attribute__((always_inline)) void each(F&& f, std::integer_sequence<int, I...>) {
  (f(Index<I>{}), ...);
}
// Loops whose index is a constant; GCC keeps arrays in registers only where no loop is left.
template <int N, class F> inline __attribute__((always_inline)) void unrolled(F&& f) {
  each(f, std::make_integer_sequence<int, N>{});
}

inline __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }

// sum += codes (unsigned) x four activations, for every lane. Assembly, because GCC 12 makes of the intrinsics more moves
// and separate broadcasts.
inline __attribute__((always_inline)) void add_products(__m512i& sum, __m512i codes, __m512i q) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(q));
}
inline __attribute__((always_inline)) __m512i four(const int8_t* q) {
  __m512i v;
  asm("vpbroadcastd %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const int8_t(*)[4]>(q)));
  return v;
}
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
// GCC takes a function that does nothing else for one without effect and drops its calls: a lambda around it must be always_inline.
inline __attribute__((always_inline)) void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

} // namespace
} // namespace d2moe
