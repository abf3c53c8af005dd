// Attention over a paged cache of keys and values.
#pragma once
#include "dense.h"

namespace d2moe {

enum class KvType { f16, q8 };

// Keys and values of all layers, in blocks of block_tokens tokens (a multiple of kKeyTile):
//   keys [layers, kv_heads, blocks] of tiles of 16 tokens, then values [layers, kv_heads, blocks, block_tokens, head_dim]
//   (kernels.h, scores_* and mix_*), halves or one byte each; with q8 also a scale f32 for each token's key, then each value.
// A head's blocks are neighbours: blocks are mostly handed out in order, and a long context is then read as one stream.
class KvCache {
public:
  KvCache(KvType type, int64_t layers, int64_t blocks, int64_t block_tokens, int64_t kv_heads, int64_t head_dim);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  struct Head {
    uint8_t *keys, *values;
    float *key_scale, *value_scale; // [block_tokens], q8 only
  };
  Head head(int64_t layer, int64_t block, int64_t kv_head) const;
  // One token's key and value, [head_dim] each, into their place.
  void store(const KernelTable& k, const Head& head, int64_t token, const float* key, const float* value) const;

  int64_t key_bytes() const { return head_dim * (type == KvType::f16 ? 2 : 1); } // or a value's, of one head
  // Bytes of one block of one layer.
  static int64_t block_bytes(KvType type, int64_t block_tokens, int64_t kv_heads, int64_t head_dim);
  const KvType type;
  const int64_t layers, blocks, block_tokens, kv_heads, head_dim;

private:
  int64_t plane_bytes() const { return block_tokens * key_bytes(); } // keys or values of a head
  uint8_t* memory_;
  int64_t bytes_;
};

struct AttentionShape {
  int64_t hidden, heads, kv_heads, head_dim, window; // window 0: all earlier tokens
  int qk_norm;                                        // 0 none, 1 per head, 2 over all heads
  float eps, clip;                                    // clip 0: none
};

// Which token sits where: position in its sequence, and that sequence's row in block_tables.
struct TokenPlaces {
  const int32_t* position;     // [tokens]
  const int32_t* sequence;     // [tokens]
  const int32_t* block_tables; // [sequences, table_blocks]
  int64_t table_blocks;
};

// Cosine and sine of every token's rotations, [tokens, head_dim / 2].
struct Angles {
  const float *cosine, *sine;
};

struct AttentionWeights {
  const float* norm;
  Linear q, k, v, o;
  const float *q_norm, *k_norm; // by qk_norm
};

// x [tokens, hidden] += attention(norm(x)); keys and values of the tokens are appended to the cache.
void attention(Runtime& rt, const AttentionShape& s, const AttentionWeights& w, KvCache& kv, int64_t layer,
               const TokenPlaces& places, const Angles& angles, int64_t tokens, float* x);

} // namespace d2moe
