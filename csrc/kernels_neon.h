// The seam between kernels_neon.cpp (dot product instructions) and kernels_neon_i8mm.cpp (matrix instructions). Declarations
// only: the two are compiled for different CPUs and must not share a function that the linker could pick for both.
#pragma once
#include "kernels.h"

namespace d2moe {

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

} // namespace d2moe
