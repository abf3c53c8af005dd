// KernelTable: everything that has one version per instruction set. kernels_scalar.cpp is the numeric definition.
//
// Rules for every table:
//  * nested products: dot and sum are exact integers; the float part is done exactly as written at `matmul`, groups in
//    ascending order, separate multiply and add (the files are compiled with -ffp-contract=off). So tables agree bit for bit.
//  * quantize: max, one division, multiply, round half to even. Bit for bit, too.
//  * the other slots, too: the scalar table fixes the order of additions (32 or 16 interleaved lanes, added half to half)
//    and every operation of exp, so that logits are the same whatever the table. A last-bit difference would not stay
//    small: it moves an activation over a rounding step, and that is one part in 127.
//  * one output may depend only on its own inputs, never on how many other rows or tokens are in the call: batch splits
//    and threads must not show.
//  * the files share no inline code: a helper compiled for AVX-512 must not be picked by the linker for a plain CPU.
#pragma once
#include "layout.h"

namespace d2moe {

// A matrix in memory. Either `flat` (all eight bits, register order) or base + planes, never both.
struct Matrix {
  MatrixShape shape;
  const uint16_t* affine = nullptr; // f16 [tiles, groups, 2, 16]: range S, low L
  const uint8_t* flat = nullptr;    // u8 [tiles, groups, group/4, 64]
  const uint8_t* base = nullptr;    // u8 [tiles, groups, group/16, 64], byte bits 2f+1..2f = top two bits of register 4i+f
  const uint8_t* planes[kPlanes] = {}; // u8 [tiles, groups, group/32, 64], byte bit f = that bit of register 8i+f
};

// m rows of int8 activations, `stride` = padded columns, groups as in the matrix they meet.
struct Activations {
  const int8_t* q;      // [m, groups*group]
  const float* scale;   // [m, groups]
  const int32_t* sum;   // [m, groups]
  int64_t m;
};

struct KernelTable {
  const char* name;

  // One row: x[cols] -> q[groups*group], scale[groups], sum[groups]. Columns past `cols` are zero.
  void (*quantize)(const float* x, int64_t cols, int group, int8_t* q, float* scale, int32_t* sum);

  // y[i*ldy + row] for rows of tiles [tile0, tile1) and all i < x.m. Rows past shape.rows are not written.
  //   per group, ascending:  inner = s*(dot + half*t) + L*t;  acc = acc + scale*inner
  //   s = f32(S)*2^-8, half = 2^(7-bits), t = f32(sum), dot = f32(sum_i prefix_bits(code_i)*q_i)
  // flat matrices take every width, too (prefix of the flat code).
  void (*matmul)(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy);

  // One dot product of floats and one of halves with floats.
  float (*dot_f32)(const float* a, const float* b, int64_t n);
  float (*dot_f16)(const uint16_t* a, const float* b, int64_t n);
  // y += alpha * f32(x)
  void (*axpy_f16)(float alpha, const uint16_t* x, float* y, int64_t n);
  // Sum of squares (for RMS norms).
  float (*sum_squares)(const float* x, int64_t n);
  // x[i] = exp(x[i] - offset), returns the sum; relative error of exp below 2e-6.
  float (*exp_sum)(float* x, float offset, int64_t n);
  // gate[i] = silu(gate[i]) * up[i]
  void (*silu_mul)(float* gate, const float* up, int64_t n);
  // Conversions, round half to even.
  void (*to_f16)(const float* x, uint16_t* y, int64_t n);
  void (*to_f32)(const uint16_t* x, float* y, int64_t n);
  // Reads n bytes (a multiple of 64) and returns their xor: what the memory itself can give.
  uint64_t (*read_bytes)(const uint8_t* p, int64_t n);
};

// The table in use, and the ones this binary and this CPU can run (dispatch.cpp).
const KernelTable* kernel_table(const char* name); // nullptr: not built, or not supported by this CPU
const KernelTable* best_kernel_table();            // honours D2MOE_KERNELS; throws on an unknown or unsupported name

extern const KernelTable kScalarTable;
#if defined(__x86_64__)
extern const KernelTable kAvx2Table;
extern const KernelTable kAvx512Table;
#endif

} // namespace d2moe
