// What the files of the NEON table share. matmul_neon.cpp and kernels_neon.cpp are compiled for the dot product instructions,
// kernels_neon_i8mm.cpp for the matrix instructions, too: no function but those in the unnamed namespace may be defined here,
// as the linker would pick one for all.
#pragma once
#include "kernels.h"

#include <arm_neon.h>
#include <utility>

namespace d2moe {
namespace neon {

// matmul_neon.cpp
void matmul(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy);
const char* variant(int bits, int64_t m);

} // namespace neon

// A run of whole groups of one tile, unpacked to codes less 128. Every 8 columns are 128 bytes of 2 x 8 matrices: rows 0-1,
// rows 2-3 … rows 14-15, each row 8 bytes.
struct NeonChunk {
  const int8_t* codes;
  const uint8_t* affine;
  int64_t group0, count;
  int group;
  float offset; // half + 128
};

// acc [n, 16] of tokens [i0, i0 + n), n at most 4, goes on through the chunk's groups; an odd n has room for one token more,
// whose sums mean nothing. Needs FEAT_I8MM.
void neon_i8mm_chunk(const NeonChunk& c, const Activations& x, int64_t groups, int64_t i0, int64_t n, float* acc);

namespace {

template <int N> struct Index { static constexpr int value = N; };
template <class F, int... I> inline __attribute__((always_inline)) void each(F&& f, std::integer_sequence<int, I...>) {
  (f(Index<I>{}), ...);
}
// Loops whose index is a constant; GCC keeps arrays in registers only where no loop is left.
template <int N, class F> inline __attribute__((always_inline)) void unrolled(F&& f) {
  each(f, std::make_integer_sequence<int, N>{});
}
// f(Index<T>, i) for items [i, i + T) of n: fours, then what is left.
template <class F> inline __attribute__((always_inline)) void by_fours(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) f(Index<4>{}, i);
  if (n - i == 3) f(Index<3>{}, i);
  else if (n - i == 2) f(Index<2>{}, i);
  else if (n - i == 1) f(Index<1>{}, i);
}
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

} // namespace
} // namespace d2moe
