// What every token passes: embedding, attention, router, dense feed-forward blocks, head. All weights are borrowed.
#pragma once
#include "kernels.h"
#include "threads.h"

#include <vector>

namespace d2moe {

// One engine's compute resources.
struct Runtime {
  Runtime(int threads, const KernelTable* table, int64_t scratch_bytes)
      : pool(threads), table(table), scratch(scratch_bytes) {}
  Pool pool;
  const KernelTable* table;
  Scratch scratch;
};

struct Linear {
  Matrix matrix;
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
void rms_norm(const KernelTable& k, const float* x, const float* weight, float eps, int64_t n, float* y);

// One product of a parallel batch of products: y[m, rows] = rows of x times matrix at `bits`.
struct Product {
  const Matrix* matrix;
  int bits;
  Activations x;
  float* y;
  int64_t ldy;
  const float* bias;
};
// All products in one parallel region, cut by tiles.
void multiply(Runtime& rt, const std::vector<Product>& products);

// Paged cache of keys and values, f16: [layers][blocks][2][kv_heads][block_tokens][head_dim].
class KvCache {
public:
  KvCache(int64_t layers, int64_t blocks, int64_t block_tokens, int64_t kv_heads, int64_t head_dim);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  // Keys (which = 0) or values (1) of one head in one block: [block_tokens, head_dim].
  uint16_t* head(int64_t layer, int64_t block, int which, int64_t kv_head) const {
    return memory_ + ((((layer * blocks + block) * 2 + which) * kv_heads + kv_head) * block_tokens) * head_dim;
  }
  void release(int64_t block); // the block's pages go back to the system
  const int64_t layers, blocks, block_tokens, kv_heads, head_dim;

private:
  uint16_t* memory_;
  int64_t bytes_;
};

struct AttentionShape {
  int64_t hidden, heads, kv_heads, head_dim, window; // window 0: all earlier tokens
  int qk_norm;                                        // 0 none, 1 per head, 2 over all heads
  float eps, clip, rope_scale;                        // clip 0: none; rope_scale multiplies cos and sin (yarn)
};

// Which token sits where: position in its sequence, and that sequence's row in block_tables.
struct TokenPlaces {
  const int32_t* position;     // [tokens]
  const int32_t* sequence;     // [tokens]
  const int32_t* block_tables; // [sequences, table_blocks]
  int64_t table_blocks;
};

struct AttentionWeights {
  const float* norm;
  Linear q, k, v, o;
  const float *q_norm, *k_norm; // by qk_norm
  const float* inverse_frequency; // [head_dim / 2]
};

// x [tokens, hidden] += attention(norm(x)); keys and values of the tokens are appended to the cache.
void attention(Runtime& rt, const AttentionShape& s, const AttentionWeights& w, KvCache& kv, int64_t layer,
               const TokenPlaces& places, int64_t tokens, float* x);

// h = norm(x); top_k experts by softmax of router * h: ids and gates [tokens, top_k], largest first, ties by index.
void route(Runtime& rt, const float* norm, const float* router, int64_t hidden, int64_t experts, int64_t top_k,
           bool normalise, float eps, int64_t tokens, const float* x, float* h, int32_t* ids, float* gates);

// x += scale * down(silu(gate h) * up h), scale = sigmoid(mix . h) or 1 where mix is null.
void feed_forward(Runtime& rt, const Linear& gate, const Linear& up, const Linear& down, const float* mix,
                  int64_t tokens, const float* h, float* x);

// Rows of a flat matrix as floats.
void embed(Runtime& rt, const Matrix& table, const int32_t* ids, int64_t tokens, float* x);

// logits [tokens, vocab] = head * norm(x)
void project(Runtime& rt, const float* norm, float eps, const Linear& head, int64_t tokens, const float* x,
             float* logits);

} // namespace d2moe
