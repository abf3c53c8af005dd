// What every token passes besides attention: products, norms, router, dense feed-forward blocks, embedding and head. All
// weights are borrowed.
#pragma once
#include "kernels.h"
#include "threads.h"

#include <map>
#include <tuple>
#include <vector>

namespace d2moe {

// How often each way of multiplying was taken, for `d2moe bench --explain`: (rows, columns, bits, way) -> (products, tokens).
using Tally = std::map<std::tuple<int64_t, int64_t, int, const char*>, std::pair<int64_t, int64_t>>;

// One engine's compute resources.
struct Runtime {
  Runtime(int threads, const KernelTable* table, int64_t scratch_bytes)
      : pool(threads), table(table), scratch(scratch_bytes) {}
  Pool pool;
  const KernelTable* table;
  Scratch scratch;
  Tally tally;
  bool counting = false; // whether `multiply` fills the tally
};

struct Linear {
  Matrix matrix;
  int bits = kMaxBits;
  const float* bias = nullptr; // [rows] or none
};

// Int8 rows in scratch memory, together with their scales and sums.
struct QuantRows {
  int8_t* q;
  float* scale;
  int32_t* sum;
  int64_t m, stride, groups;
  Activations row(int64_t i, int64_t count) const {
    return {q + i * stride, scale + i * groups, sum + i * groups, count};
  }
};

QuantRows quant_rows(Runtime& rt, int64_t m, int64_t cols, int group);
void quantize_row(Runtime& rt, const float* x, int64_t cols, int group, QuantRows& out, int64_t i);
// What gate and up make for down, as down's row i: silu(gate) * up, rotated in spans of `rotation` (0: not at all; see rotate.h).
// Overwrites gate[n].
void inner_row(Runtime& rt, float* gate, const float* up, int64_t n, int group, int rotation, QuantRows& out, int64_t i);
float rms_scale(const KernelTable& k, const float* x, float eps, int64_t n);
void rms_norm(const KernelTable& k, const float* x, const float* weight, float eps, int64_t n, float* y);
// x [tokens, n] += y, in parallel.
void add_rows(Runtime& rt, const float* y, int64_t tokens, int64_t n, float* x);

// One product of a parallel batch of products: y[m, rows] = rows of x times matrix at `bits`.
struct Product {
  const Matrix* matrix;
  int bits;
  Activations x;
  float* y;
  int64_t ldy;
  const float* bias;
};
inline Product product(const Linear& l, const Activations& x, float* y) {
  return {&l.matrix, l.bits, x, y, l.matrix.shape.rows, l.bias};
}
// All products in one parallel region, cut by tiles.
void multiply(Runtime& rt, const std::vector<Product>& products);
// For those who cut themselves: notes what ways the products take, and multiplies tiles [begin, end) of one.
void tally(Runtime& rt, const std::vector<Product>& products);
void multiply_tiles(const KernelTable& k, const Product& p, int64_t begin, int64_t end);

struct RouterWeights {
  const float *norm, *weight; // [hidden], [experts, hidden]
  int64_t hidden, experts, top_k;
  bool normalise;
  float eps;
};

// h = norm(x); top_k experts by softmax of weight * h: ids and gates [tokens, top_k], largest first, ties by index.
// The choice alone: logits of h, experts and gates.
void pick(Runtime& rt, const RouterWeights& w, int64_t tokens, const float* h, int32_t* ids, float* gates);
void route(Runtime& rt, const RouterWeights& w, int64_t tokens, const float* x, float* h, int32_t* ids, float* gates);

struct FeedForwardWeights {
  Linear gate, up, down;
  const float* mix = nullptr;  // [hidden]: the output is scaled by sigmoid(mix . h)
  const float* norm = nullptr; // [hidden]: this block norms its input itself
  float eps = 0.0f;
  int rotation = 0;            // of what down meets
};

// x += scale * down(silu(gate h) * up h). h is the normed input; where the block has a norm, h is computed here from x.
void feed_forward(Runtime& rt, const FeedForwardWeights& w, int64_t tokens, float* h, float* x);

// Rows of a matrix as floats [tokens, cols].
void embed(Runtime& rt, const Linear& table, const int32_t* ids, int64_t tokens, float* x);

// logits [tokens, vocab] = head * norm(x).
void project(Runtime& rt, const float* norm, float eps, const Linear& head, int64_t tokens, const float* x, float* logits);

} // namespace d2moe
