#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <sys/mman.h>
#include <utility>

namespace d2moe {

int64_t KvCache::block_bytes(KvType type, int64_t block_tokens, int64_t kv_heads, int64_t head_dim) {
  return kv_heads * block_tokens * (type == KvType::f16 ? 4 * head_dim : 2 * head_dim + 8);
}

KvCache::KvCache(KvType type, int64_t layers, int64_t blocks, int64_t block_tokens, int64_t kv_heads, int64_t head_dim)
    : type(type), layers(layers), blocks(blocks), block_tokens(block_tokens), kv_heads(kv_heads), head_dim(head_dim),
      bytes_(layers * blocks * block_bytes(type, block_tokens, kv_heads, head_dim)) {
  if (block_tokens % kKeyTile || (type == KvType::q8 && head_dim % 4))
    throw std::invalid_argument("a block holds whole tiles of 16 keys, and 8-bit keys need head_dim to be a multiple of 4");
  void* p = mmap(nullptr, size_t(bytes_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<uint8_t*>(p);
#if defined(MADV_HUGEPAGE)
  // A long context is read from all over the cache. The budget counts the whole of it, so a page too early costs nothing.
  madvise(p, size_t(bytes_), MADV_HUGEPAGE);
#endif
}

KvCache::~KvCache() { munmap(memory_, size_t(bytes_)); }

KvCache::Head KvCache::head(int64_t layer, int64_t block, int64_t kv_head) const {
  const int64_t pieces = layers * kv_heads * blocks, piece = (layer * kv_heads + kv_head) * blocks + block;
  float* scales = reinterpret_cast<float*>(memory_ + 2 * pieces * plane_bytes());
  return {memory_ + piece * plane_bytes(), memory_ + (pieces + piece) * plane_bytes(), scales + piece * block_tokens,
          scales + (pieces + piece) * block_tokens};
}

void KvCache::store(const KernelTable& k, const Head& head, int64_t token, const float* key, const float* value) const {
  const int64_t tile = token / kKeyTile, lane = token % kKeyTile;
  if (type == KvType::f16) {
    uint16_t halves[512];
    uint16_t* keys = reinterpret_cast<uint16_t*>(head.keys) + tile * head_dim * kKeyTile + lane;
    for (int64_t d0 = 0; d0 < head_dim; d0 += 512) {
      const int64_t n = std::min(head_dim - d0, int64_t(512));
      k.to_f16(key + d0, halves, n);
      for (int64_t d = 0; d < n; ++d) keys[(d0 + d) * kKeyTile] = halves[d];
    }
    k.to_f16(value, reinterpret_cast<uint16_t*>(head.values) + token * head_dim, head_dim);
    return;
  }
  int8_t codes[256];
  const auto quantize = [&](const float* x, auto put) { // one scale for the whole head, however long it is
    float largest = 0.0f;
    for (int64_t d = 0; d < head_dim; ++d) largest = std::fmax(largest, std::fabs(x[d]));
    const float inverse = largest > 0x1p-100f ? 127.0f / largest : 0.0f;
    for (int64_t d0 = 0; d0 < head_dim; d0 += 256) {
      const int64_t n = std::min(head_dim - d0, int64_t(256));
      for (int64_t d = 0; d < n; ++d) codes[d] = int8_t(std::nearbyintf(x[d0 + d] * inverse));
      put(d0, n);
    }
    return largest > 0x1p-100f ? largest / 127.0f : 0.0f;
  };
  uint8_t* keys = head.keys + tile * head_dim * kKeyTile + lane * 4;
  head.key_scale[token] = quantize(key, [&](int64_t d0, int64_t n) {
    for (int64_t d = 0; d < n; ++d) keys[(d0 + d) / 4 * 4 * kKeyTile + (d0 + d) % 4] = uint8_t(codes[d] + 128);
  });
  head.value_scale[token] = quantize(value, [&](int64_t d0, int64_t n) {
    std::memcpy(head.values + token * head_dim + d0, codes, size_t(n));
  });
}

namespace {

// Rotates the two halves of one head (the "rotate_half" convention of all these families).
void rotate(float* head, const float* cosine, const float* sine, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cosine[i] - b * sine[i];
    head[half + i] = b * cosine[i] + a * sine[i];
  }
}

// A head ready for attention: y[head_dim] = x with its norm and its rotation. `scale` is that of a norm over all heads of a token, whose
// weights for this head are `norm`. y may be x.
void prepare_head(const KernelTable& k, const AttentionShape& s, const float* x, const float* norm, float scale, const float* cosine,
                  const float* sine, float* y) {
  for (int64_t i = 0; i < s.head_dim; ++i) y[i] = s.qk_norm == 2 ? norm[i] * (x[i] * scale) : x[i];
  if (s.clip > 0)
    for (int64_t i = 0; i < s.head_dim; ++i) y[i] = std::min(std::max(y[i], -s.clip), s.clip);
  if (s.qk_norm == 1) rms_norm(k, y, norm, s.eps, s.head_dim, y);
  rotate(y, cosine, sine, s.head_dim / 2);
}

// Queries that share their keys: tokens [token, token + tokens) of one sequence and heads [head, head + heads) of one
// key-value head, tokens * heads <= kQueries. How queries are grouped does not show in the results.
struct Item {
  int64_t token, tokens, head, heads;
};

std::vector<Item> items_of(const AttentionShape& s, const TokenPlaces& places, int64_t tokens) {
  const int64_t shared = s.heads / s.kv_heads, heads = std::min(shared, int64_t(kQueries));
  const int64_t most = s.window > 0 ? 1 : std::max(kQueries / heads, int64_t(1)); // tokens
  std::vector<Item> items;
  for (int64_t t = 0; t < tokens;) {
    int64_t n = 1;
    while (n < most && t + n < tokens && places.sequence[t + n] == places.sequence[t] &&
           places.position[t + n] == places.position[t] + n)
      ++n;
    for (int64_t g = 0; g < s.kv_heads; ++g)
      for (int64_t h = 0; h < shared; h += heads) items.push_back({t, n, g * shared + h, std::min(heads, shared - h)});
    t += n;
  }
  return items;
}

// The scratch of one item: queries [kQueries, head_dim] as floats and codes, scores [kQueries, span], out [kQueries, head_dim].
struct Desk {
  float *q, *scores, *out;
  int8_t* codes;
  int64_t span;
};

// Where the neighbours from blocks[at] on end, before `end`: a head's keys and values there are one piece of memory.
int64_t neighbours(const int32_t* blocks, int64_t at, int64_t end) {
  int64_t next = at + 1;
  while (next < end && blocks[next] == blocks[next - 1] + 1) ++next;
  return next;
}

// Scores of all queries against positions from block0's first to `end`, the query's own factor included; queries in halves bring it
// along.
void score(const KernelTable& k, const KvCache& kv, int64_t layer, const int32_t* blocks, int64_t block0, int64_t end,
           int64_t kv_head, int64_t n, const Desk& d) {
  const int64_t dim = kv.head_dim, block1 = (end + kv.block_tokens - 1) / kv.block_tokens;
  const int padded = int(round_up(dim, 4));
  float factor[kQueries];
  for (int64_t i = 0; i < n; ++i) {
    if (kv.type != KvType::q8) break;
    float largest = 0.0f;
    for (int64_t e = 0; e < dim; ++e) largest = std::fmax(largest, std::fabs(d.q[i * dim + e]));
    const float inverse = largest > 0x1p-100f ? 127.0f / largest : 0.0f;
    for (int64_t e = 0; e < dim; ++e) d.codes[i * padded + e] = int8_t(std::nearbyintf(d.q[i * dim + e] * inverse));
    factor[i] = largest / 127.0f;
  }
  for (int64_t b = block0, next; b < block1; b = next) {
    next = neighbours(blocks, b, block1);
    const int64_t tiles = (std::min(next * kv.block_tokens, end) - b * kv.block_tokens + kKeyTile - 1) / kKeyTile;
    const KvCache::Head head = kv.head(layer, blocks[b], kv_head);
    const Rows out{d.scores + (b - block0) * kv.block_tokens, d.span};
    if (kv.type == KvType::f16)
      k.scores_f16(reinterpret_cast<const uint16_t*>(head.keys), tiles, dim, {d.q, dim}, n, out);
    else
      k.scores_q8(head.keys, head.key_scale, tiles, dim, d.codes, padded, n, out);
  }
  for (int64_t i = 0; i < n && kv.type == KvType::q8; ++i)
    for (int64_t j = 0; j < end - block0 * kv.block_tokens; ++j) d.scores[i * d.span + j] *= factor[i];
}

// out[i] += the values of positions [from, to) weighed by scores, for queries [i0, i0 + n); scores begin at `origin`.
void mix(const KernelTable& k, const KvCache& kv, int64_t layer, const int32_t* blocks, int64_t kv_head, int64_t from,
         int64_t to, int64_t origin, int64_t i0, int64_t n, const Desk& d) {
  const int64_t dim = kv.head_dim;
  for (int64_t at = from; at < to;) {
    const int64_t first = at % kv.block_tokens, block = at / kv.block_tokens;
    const int64_t count = std::min(neighbours(blocks, block, (to - 1) / kv.block_tokens + 1) * kv.block_tokens, to) - at;
    const KvCache::Head head = kv.head(layer, blocks[block], kv_head);
    const ConstRows p{d.scores + i0 * d.span + at - origin, d.span};
    const Rows out{d.out + i0 * dim, dim};
    if (kv.type == KvType::f16)
      k.mix_f16(reinterpret_cast<const uint16_t*>(head.values) + first * dim, count, dim, p, n, out);
    else
      k.mix_q8(reinterpret_cast<const int8_t*>(head.values) + first * dim, head.value_scale + first, count, dim, p, n, out);
    at += count;
  }
}

// In lanes, which compilers make registers of; std::max_element takes one at a time.
float largest_of(const float* x, int64_t n) {
  constexpr int kLanes = 16;
  float lane[kLanes];
  std::fill(lane, lane + kLanes, x[0]);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
  for (; i < n; ++i) lane[0] = std::max(lane[0], x[i]);
  return *std::max_element(lane, lane + kLanes);
}

// All queries of one item over their keys; the order of additions depends on each query's position alone. `out` may be q.
void attend(const KernelTable& k, const AttentionShape& s, const KvCache& kv, int64_t layer, const TokenPlaces& places,
            const Item& item, const float* q, const Desk& d, float* out) {
  const int64_t dim = s.head_dim, n = item.tokens * item.heads, q_dim = s.heads * dim;
  const int64_t kv_head = item.head / (s.heads / s.kv_heads);
  const int32_t* blocks = places.block_tables + places.sequence[item.token] * places.table_blocks;
  const int64_t position = places.position[item.token]; // of the first token; the others follow it
  const int64_t start = s.window > 0 ? std::max(position - s.window + 1, int64_t(0)) : 0;
  const int64_t block0 = start / kv.block_tokens, origin = block0 * kv.block_tokens;
  const float root = 1.0f / std::sqrt(float(dim));
  for (int64_t i = 0; i < n; ++i) {
    const float* from = q + (item.token + i / item.heads) * q_dim + (item.head + i % item.heads) * dim;
    for (int64_t e = 0; e < dim; ++e) d.q[i * dim + e] = from[e] * root;
  }
  score(k, kv, layer, blocks, block0, position + item.tokens, kv_head, n, d);
  const int64_t row = kv.key_bytes();
  const uint8_t* values = kv.head(layer, blocks[block0], kv_head).values + (start - origin) * row;
  for (int64_t i = 0; i < 16 * row; i += 64) __builtin_prefetch(values + i); // come while weights are made of the scores
  float sums[kQueries];
  for (int64_t i = 0; i < n; ++i) {
    float* scores = d.scores + i * d.span + start - origin;
    const int64_t count = position + i / item.heads + 1 - start;
    sums[i] = k.exp_sum(scores, largest_of(scores, count), count);
  }
  std::fill(d.out, d.out + n * dim, 0.0f);
  mix(k, kv, layer, blocks, kv_head, start, position + 1, origin, 0, n, d); // what all see
  for (int64_t i = item.heads; i < n; ++i)                                  // and what only later tokens see
    mix(k, kv, layer, blocks, kv_head, position + 1, position + i / item.heads + 1, origin, i, 1, d);
  for (int64_t i = 0; i < n; ++i) {
    float* to = out + (item.token + i / item.heads) * q_dim + (item.head + i % item.heads) * dim;
    for (int64_t e = 0; e < dim; ++e) to[e] = d.out[i * dim + e] / sums[i];
  }
}

// Queries, keys and values of all tokens: norms and rotations; queries go to `turned`, keys and values to the cache. Overwrites value.
void prepare(Runtime& rt, const AttentionShape& s, const AttentionWeights& w, KvCache& kv, int64_t layer, const TokenPlaces& places,
             const Angles& angles, int64_t tokens, const float* q, const float* key, float* value, float* turned) {
  const KernelTable& k = *rt.table;
  const int64_t dim = s.head_dim, q_dim = s.heads * dim, kv_dim = s.kv_heads * dim, shared = s.heads / s.kv_heads;
  float* keys = rt.scratch.get<float>(rt.pool.size() * dim);
  rt.pool.parallel_for(tokens * s.kv_heads, 2, [&](int64_t begin, int64_t end, int thread) {
    float q_scale = 0.0f, k_scale = 0.0f, *turned_key = keys + thread * dim;
    const auto place = [&](int64_t n) {
      const int64_t t = n / s.kv_heads, position = places.position[t];
      const int32_t block = places.block_tables[places.sequence[t] * places.table_blocks + position / kv.block_tokens];
      return std::pair(kv.head(layer, block, n % s.kv_heads), position % kv.block_tokens);
    };
    if (tokens == 1) // a key is scattered over as many lines as its head is long: those are asked for before the first is written
      for (int64_t n = begin; n < end; ++n) {
        const auto [head, at] = place(n);
        const int64_t tile = kv.key_bytes() * kKeyTile;
        for (int64_t i = 0; i < tile; i += 64) __builtin_prefetch(head.keys + at / kKeyTile * tile + i, 1);
      }
    for (int64_t n = begin; n < end; ++n) {
      const int64_t t = n / s.kv_heads, g = n % s.kv_heads;
      if (s.qk_norm == 2 && (n == begin || g == 0)) {
        q_scale = rms_scale(k, q + t * q_dim, s.eps, q_dim);
        k_scale = rms_scale(k, key + t * kv_dim, s.eps, kv_dim);
      }
      const float *cosine = angles.cosine + t * (dim / 2), *sine = angles.sine + t * (dim / 2);
      for (int64_t h = g * shared; h < (g + 1) * shared; ++h)
        prepare_head(k, s, q + t * q_dim + h * dim, w.q_norm + (s.qk_norm == 2 ? h * dim : 0), q_scale, cosine, sine, turned + t * q_dim + h * dim);
      prepare_head(k, s, key + t * kv_dim + g * dim, w.k_norm + (s.qk_norm == 2 ? g * dim : 0), k_scale, cosine, sine, turned_key);
      float* v = value + t * kv_dim + g * dim;
      if (s.clip > 0)
        for (int64_t i = 0; i < dim; ++i) v[i] = std::min(std::max(v[i], -s.clip), s.clip);
      const auto [head, at] = place(n);
      kv.store(k, head, at, turned_key, v);
    }
  });
}

} // namespace

void attention(Runtime& rt, const AttentionShape& s, const AttentionWeights& w, KvCache& kv, int64_t layer,
               const TokenPlaces& places, const Angles& angles, int64_t tokens, float* x) {
  ScratchScope scope(rt.scratch);
  const KernelTable& k = *rt.table;
  const int64_t q_dim = s.heads * s.head_dim, kv_dim = s.kv_heads * s.head_dim;
  const int group = w.q.matrix.shape.group;

  float* normed = rt.scratch.get<float>(tokens * s.hidden);
  QuantRows in = quant_rows(rt, tokens, s.hidden, group);
  rt.pool.parallel_for(tokens, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      rms_norm(k, x + t * s.hidden, w.norm, s.eps, s.hidden, normed + t * s.hidden);
      quantize_row(rt, normed + t * s.hidden, s.hidden, group, in, t);
    }
  });

  float* q = rt.scratch.get<float>(tokens * q_dim);
  float* key = rt.scratch.get<float>(tokens * kv_dim);
  float* value = rt.scratch.get<float>(tokens * kv_dim);
  const Activations rows = in.row(0, tokens);
  multiply(rt, {product(w.q, rows, q), product(w.k, rows, key), product(w.v, rows, value)});
  float* mixed = rt.scratch.get<float>(tokens * q_dim); // first the queries; who reads a head's query puts its output there
  prepare(rt, s, w, kv, layer, places, angles, tokens, q, key, value, mixed);

  int64_t longest = 0;
  for (int64_t t = 0; t < tokens; ++t) longest = std::max(longest, int64_t(places.position[t]) + 1);
  const int64_t span = round_up(longest, kv.block_tokens);
  const std::vector<Item> items = items_of(s, places, tokens);
  std::vector<Desk> desks;
  for (int i = 0; i < rt.pool.size(); ++i)
    desks.push_back({rt.scratch.get<float>(kQueries * s.head_dim), rt.scratch.get<float>(kQueries * span),
                     rt.scratch.get<float>(kQueries * s.head_dim), rt.scratch.get<int8_t>(kQueries * round_up(s.head_dim, 4)), span});
  rt.pool.parallel_for(int64_t(items.size()), 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i)
      attend(k, s, kv, layer, places, items[size_t(i)], mixed, desks[size_t(thread)], mixed);
  });

  QuantRows out = quant_rows(rt, tokens, q_dim, group);
  rt.pool.parallel_for(tokens, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) quantize_row(rt, mixed + t * q_dim, q_dim, group, out, t);
  });
  float* y = normed; // free by now, same shape
  multiply(rt, {product(w.o, out.row(0, tokens), y)});
  add_rows(rt, y, tokens, s.hidden, x);
}

} // namespace d2moe
