// KernelTable: everything that has one version per instruction set. kernels_scalar.cpp is the numeric definition.
//
// Rules for every table:
//  * nested products: dot and n are exact integers (n a multiple of one half); the float part is done exactly as written at
//    `matmul`, groups in ascending order, separate multiply and add (the files are compiled with -ffp-contract=off). So tables
//    agree bit for bit.
//  * quantize: max, one division, multiply, round half to even. Bit for bit, too.
//  * the other slots, too: the scalar table fixes the order of additions and every operation of exp, so that logits are the
//    same whatever the table. A last-bit difference would not stay small: it moves an activation over a rounding step, and
//    that is one part in 127.
//  * one output may depend only on its own inputs, never on how many other rows, queries or tokens are in the call: batch
//    splits and threads must not show.
//  * the files share no inline code: a helper compiled for AVX-512 must not be picked by the linker for a plain CPU.
#pragma once
#include "layout.h"

namespace d2moe {

// A nested matrix in memory; planes past the width in use may be absent.
struct Matrix {
  MatrixShape shape;
  const float* row_scale = nullptr; // f32 [tiles, 16]
  const uint8_t* affine = nullptr;  // u8 [tiles, groups, 2, 16]: step S, then zero Z, of each row
  const uint8_t* base = nullptr;    // u8 [tiles, groups, group/16, 64], byte bits 2f+1..2f = top two bits of register 4i+f
  const uint8_t* planes[kPlanes] = {}; // u8 [tiles, groups, group/32, 64], byte bit kPlaneBit[f] = that bit of register 8i+f
};

// m rows of int8 activations, `stride` = padded columns, groups as in the matrix they meet.
struct Activations {
  const int8_t* q;      // [m, groups*group]
  const float* scale;   // [m, groups]
  const int32_t* sum;   // [m, groups]
  int64_t m;
};

// Several rows of floats: row i begins at data + i * stride.
struct Rows {
  float* data;
  int64_t stride;
};
struct ConstRows {
  const float* data;
  int64_t stride;
};

struct KernelTable {
  const char* name;

  // One row: x[cols] -> q[groups*group], scale[groups], sum[groups]. Columns past `cols` are zero.
  void (*quantize)(const float* x, int64_t cols, int group, int8_t* q, float* scale, int32_t* sum);

  // y[i*ldy + row] for rows of tiles [tile0, tile1) and all i < x.m. Rows past shape.rows are not written.
  //   per group, ascending:  n = f32(dot) + (half - Z) * f32(sum);  acc = acc + (scale * n) * f32(S)
  //   dot = sum_i prefix_bits(code_i)*q_i, half = 2^(7-bits); at the end  y = acc * row_scale
  // n is exact in float32 for groups up to 256, whatever the order of its operations.
  void (*matmul)(const Matrix& w, int bits, const Activations& x, int64_t tile0, int64_t tile1, float* y, int64_t ldy);
  // Which of its ways `matmul` takes for m rows of activations; for people.
  const char* (*variant)(int bits, int64_t m);

  // One dot product of floats, in 32 interleaved lanes that are added half to half.
  float (*dot_f32)(const float* a, const float* b, int64_t n);

  // Attention. Keys come in tiles of 16 tokens (kKeyTile), so that one register holds one element of 16 keys:
  //   f16: u16 [tiles, head_dim, 16];   q8: u8 [tiles, head_dim/4, 16, 4] of code + 128, with a scale f32 [tiles, 16].
  // scores[i][j] for queries i < n and all keys j < 16 * tiles. n is 1 to kQueries.
  //   f16:  acc = fma(q[d], f32(key[d]), acc), d ascending: rounded once, as every CPU with vectors worth having can
  //   q8:   f32(sum_d code[d] * q[d]) * key_scale     (the query's own scale is the caller's business)
  void (*scores_f16)(const uint16_t* keys, int64_t tiles, int64_t head_dim, ConstRows q, int64_t n, Rows scores);
  void (*scores_q8)(const uint8_t* keys, const float* key_scale, int64_t tiles, int64_t head_dim, const int8_t* q,
                    int64_t q_stride, int64_t n, Rows scores);
  // out[i][d] = fma(p[i][j], f32(value[j][d]), out[i][d]), j ascending; values are f16 or i8 [count, head_dim].
  //   q8:  fma(p[i][j] * value_scale[j], f32(code), out[i][d])
  void (*mix_f16)(const uint16_t* values, int64_t count, int64_t head_dim, ConstRows p, int64_t n, Rows out);
  void (*mix_q8)(const int8_t* values, const float* value_scale, int64_t count, int64_t head_dim, ConstRows p, int64_t n,
                 Rows out);

  // Sum of squares (for RMS norms), in lanes as dot_f32.
  float (*sum_squares)(const float* x, int64_t n);
  // x[i] = exp(x[i] - offset), returns the sum in 16 lanes; relative error of exp below 2e-6.
  float (*exp_sum)(float* x, float offset, int64_t n);
  // gate[i] = silu(gate[i]) * up[i]
  void (*silu_mul)(float* gate, const float* up, int64_t n);
  // Conversions, round half to even.
  void (*to_f16)(const float* x, uint16_t* y, int64_t n);
  void (*to_f32)(const uint16_t* x, float* y, int64_t n);
  // Reads n bytes (a multiple of 64) and returns their xor: what the memory itself can give.
  uint64_t (*read_bytes)(const uint8_t* p, int64_t n);
};

constexpr int kKeyTile = 16;  // keys side by side in a register
constexpr int kQueries = 8;   // queries that meet one tile of keys in one call

constexpr const char* kTableNames[] = {"scalar", "avx2", "avx512", "neon"}; // all that exist; the better ones last

// The table in use, and the ones this binary and this CPU can run (dispatch.cpp).
const KernelTable* kernel_table(const char* name); // nullptr: not built, or not supported by this CPU
const KernelTable* best_kernel_table();            // honours D2MOE_KERNELS; throws on an unknown or unsupported name

extern const KernelTable kScalarTable;
#if defined(__x86_64__)
extern const KernelTable kAvx2Table;
extern const KernelTable kAvx512Table;
#elif defined(__aarch64__)
extern const KernelTable kNeonTable;
#endif

} // namespace d2moe
