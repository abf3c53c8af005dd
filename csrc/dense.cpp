#include "dense.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <sys/mman.h>

namespace d2moe {

QuantRows quant_rows(Runtime& rt, int64_t m, int64_t cols, int group) {
  QuantRows r;
  r.m = m;
  r.groups = (cols + group - 1) / group;
  r.stride = r.groups * group;
  r.q = rt.scratch.get<int8_t>(m * r.stride);
  r.scale = rt.scratch.get<float>(m * r.groups);
  r.sum = rt.scratch.get<int32_t>(m * r.groups);
  return r;
}

void quantize_row(Runtime& rt, const float* x, int64_t cols, int group, QuantRows& out, int64_t i) {
  rt.table->quantize(x, cols, group, out.q + i * out.stride, out.scale + i * out.groups, out.sum + i * out.groups);
}

void rms_norm(const KernelTable& k, const float* x, const float* weight, float eps, int64_t n, float* y) {
  const float scale = 1.0f / std::sqrt(k.sum_squares(x, n) / float(n) + eps);
  for (int64_t i = 0; i < n; ++i) y[i] = weight[i] * (x[i] * scale);
}

void multiply(Runtime& rt, const std::vector<Product>& products) {
  int64_t total = 0;
  for (const Product& p : products) total += p.matrix->shape.tiles();
  rt.pool.parallel_for(total, 4, [&](int64_t begin, int64_t end, int) {
    int64_t first = 0;
    for (const Product& p : products) {
      const int64_t tiles = p.matrix->shape.tiles();
      const int64_t a = std::max(begin - first, int64_t(0)), b = std::min(end - first, tiles);
      if (a < b) {
        rt.table->matmul(*p.matrix, p.bits, p.x, a, b, p.y, p.ldy);
        if (p.bias)
          for (int64_t i = 0; i < p.x.m; ++i)
            for (int64_t r = a * kTileRows; r < std::min(b * kTileRows, p.matrix->shape.rows); ++r)
              p.y[i * p.ldy + r] += p.bias[r];
      }
      first += tiles;
      if (first >= end) break;
    }
  });
}

KvCache::KvCache(int64_t layers, int64_t blocks, int64_t block_tokens, int64_t kv_heads, int64_t head_dim)
    : layers(layers), blocks(blocks), block_tokens(block_tokens), kv_heads(kv_heads), head_dim(head_dim),
      bytes_(layers * blocks * 2 * kv_heads * block_tokens * head_dim * 2) {
  void* p = mmap(nullptr, size_t(bytes_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<uint16_t*>(p);
}

KvCache::~KvCache() { munmap(memory_, size_t(bytes_)); }

void KvCache::release(int64_t block) {
  const int64_t bytes = 2 * kv_heads * block_tokens * head_dim * 2;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const auto begin = reinterpret_cast<uintptr_t>(head(layer, block, 0, 0));
    // Whole pages only; a page shared with a neighbouring block stays.
    const uintptr_t a = uintptr_t(round_up(int64_t(begin), kAlign)), b = (begin + uintptr_t(bytes)) / kAlign * kAlign;
    if (a < b) madvise(reinterpret_cast<void*>(a), b - a, MADV_DONTNEED);
  }
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

void prepare_heads(const KernelTable& k, const AttentionShape& s, float* x, int64_t heads, const float* norm,
                   const float* cosine, const float* sine) {
  const int64_t n = heads * s.head_dim;
  if (s.qk_norm == 2) rms_norm(k, x, norm, s.eps, n, x);
  if (s.clip > 0)
    for (int64_t i = 0; i < n; ++i) x[i] = std::min(std::max(x[i], -s.clip), s.clip);
  for (int64_t h = 0; h < heads; ++h) {
    float* head = x + h * s.head_dim;
    if (s.qk_norm == 1) rms_norm(k, head, norm, s.eps, s.head_dim, head);
    rotate(head, cosine, sine, s.head_dim / 2);
  }
}

// One query head over all its keys; the order of additions depends on the position alone.
void attend(const KernelTable& k, const AttentionShape& s, const KvCache& kv, int64_t layer, const int32_t* blocks,
            int64_t position, int64_t kv_head, const float* q, float* scores, float* out) {
  const int64_t start = s.window > 0 ? std::max(position - s.window + 1, int64_t(0)) : 0;
  const int64_t n = position + 1 - start, bt = kv.block_tokens;
  const float scale = 1.0f / std::sqrt(float(s.head_dim));
  float largest = -INFINITY;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t p = start + j;
    const uint16_t* key = kv.head(layer, blocks[p / bt], 0, kv_head) + p % bt * s.head_dim;
    scores[j] = k.dot_f16(key, q, s.head_dim) * scale;
    largest = std::max(largest, scores[j]);
  }
  const float sum = k.exp_sum(scores, largest, n);
  std::fill(out, out + s.head_dim, 0.0f);
  for (int64_t j = 0; j < n; ++j) {
    const int64_t p = start + j;
    k.axpy_f16(scores[j], kv.head(layer, blocks[p / bt], 1, kv_head) + p % bt * s.head_dim, out, s.head_dim);
  }
  for (int64_t i = 0; i < s.head_dim; ++i) out[i] /= sum;
}

} // namespace

void attention(Runtime& rt, const AttentionShape& s, const AttentionWeights& w, KvCache& kv, int64_t layer,
               const TokenPlaces& places, int64_t tokens, float* x) {
  ScratchScope scope(rt.scratch);
  const KernelTable& k = *rt.table;
  const int64_t q_dim = s.heads * s.head_dim, kv_dim = s.kv_heads * s.head_dim, half = s.head_dim / 2;
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
  multiply(rt, {{&w.q.matrix, 8, rows, q, q_dim, w.q.bias},
                {&w.k.matrix, 8, rows, key, kv_dim, w.k.bias},
                {&w.v.matrix, 8, rows, value, kv_dim, w.v.bias}});

  float* angles = rt.scratch.get<float>(rt.pool.size() * 2 * half);
  rt.pool.parallel_for(tokens, 4, [&](int64_t begin, int64_t end, int thread) {
    float *cosine = angles + thread * 2 * half, *sine = cosine + half;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t position = places.position[t];
      for (int64_t i = 0; i < half; ++i) {
        const float angle = float(position) * w.inverse_frequency[i];
        cosine[i] = float(std::cos(double(angle))) * s.rope_scale;
        sine[i] = float(std::sin(double(angle))) * s.rope_scale;
      }
      prepare_heads(k, s, q + t * q_dim, s.heads, w.q_norm, cosine, sine);
      prepare_heads(k, s, key + t * kv_dim, s.kv_heads, w.k_norm, cosine, sine);
      if (s.clip > 0)
        for (int64_t i = 0; i < kv_dim; ++i)
          value[t * kv_dim + i] = std::min(std::max(value[t * kv_dim + i], -s.clip), s.clip);
      const int32_t block = places.block_tables[places.sequence[t] * places.table_blocks + position / kv.block_tokens];
      const int64_t at = position % kv.block_tokens * s.head_dim;
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        k.to_f16(key + t * kv_dim + h * s.head_dim, kv.head(layer, block, 0, h) + at, s.head_dim);
        k.to_f16(value + t * kv_dim + h * s.head_dim, kv.head(layer, block, 1, h) + at, s.head_dim);
      }
    }
  });

  int64_t longest = 0;
  for (int64_t t = 0; t < tokens; ++t) longest = std::max(longest, int64_t(places.position[t]) + 1);
  float* scores = rt.scratch.get<float>(rt.pool.size() * longest);
  float* mixed = rt.scratch.get<float>(tokens * q_dim);
  rt.pool.parallel_for(tokens * s.heads, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / s.heads, h = i % s.heads;
      attend(k, s, kv, layer, places.block_tables + places.sequence[t] * places.table_blocks, places.position[t],
             h / (s.heads / s.kv_heads), q + t * q_dim + h * s.head_dim, scores + thread * longest,
             mixed + t * q_dim + h * s.head_dim);
    }
  });

  QuantRows out = quant_rows(rt, tokens, q_dim, group);
  rt.pool.parallel_for(tokens, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) quantize_row(rt, mixed + t * q_dim, q_dim, group, out, t);
  });
  float* y = normed; // free by now, same shape
  multiply(rt, {{&w.o.matrix, 8, out.row(0, tokens), y, s.hidden, w.o.bias}});
  for (int64_t i = 0; i < tokens * s.hidden; ++i) x[i] += y[i];
}

void route(Runtime& rt, const float* norm, const float* router, int64_t hidden, int64_t experts, int64_t top_k,
           bool normalise, float eps, int64_t tokens, const float* x, float* h, int32_t* ids, float* gates) {
  ScratchScope scope(rt.scratch);
  const KernelTable& k = *rt.table;
  float* logits = rt.scratch.get<float>(tokens * experts);
  rt.pool.parallel_for(tokens, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) rms_norm(k, x + t * hidden, norm, eps, hidden, h + t * hidden);
  });
  rt.pool.parallel_for(tokens * experts, 32, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      logits[i] = k.dot_f32(router + i % experts * hidden, h + i / experts * hidden, hidden);
  });
  for (int64_t t = 0; t < tokens; ++t) {
    float* l = logits + t * experts;
    const float largest = *std::max_element(l, l + experts);
    float sum = 0.0f;
    for (int64_t e = 0; e < experts; ++e) sum += l[e] = std::exp(l[e] - largest);
    float chosen = 0.0f;
    for (int64_t i = 0; i < top_k; ++i) {
      const int64_t e = std::max_element(l, l + experts) - l;
      ids[t * top_k + i] = int32_t(e);
      gates[t * top_k + i] = l[e] / sum;
      chosen += gates[t * top_k + i];
      l[e] = -1.0f;
    }
    if (normalise)
      for (int64_t i = 0; i < top_k; ++i) gates[t * top_k + i] /= chosen;
  }
}

void feed_forward(Runtime& rt, const Linear& gate, const Linear& up, const Linear& down, const float* mix,
                  int64_t tokens, const float* h, float* x) {
  ScratchScope scope(rt.scratch);
  const KernelTable& k = *rt.table;
  const int64_t hidden = gate.matrix.shape.cols, inner = gate.matrix.shape.rows;
  const int group = gate.matrix.shape.group;
  QuantRows in = quant_rows(rt, tokens, hidden, group);
  for (int64_t t = 0; t < tokens; ++t) quantize_row(rt, h + t * hidden, hidden, group, in, t);
  float* g = rt.scratch.get<float>(tokens * inner);
  float* u = rt.scratch.get<float>(tokens * inner);
  const Activations rows = in.row(0, tokens);
  multiply(rt, {{&gate.matrix, 8, rows, g, inner, nullptr}, {&up.matrix, 8, rows, u, inner, nullptr}});
  QuantRows middle = quant_rows(rt, tokens, inner, group);
  rt.pool.parallel_for(tokens, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      k.silu_mul(g + t * inner, u + t * inner, inner);
      quantize_row(rt, g + t * inner, inner, group, middle, t);
    }
  });
  float* y = rt.scratch.get<float>(tokens * hidden);
  multiply(rt, {{&down.matrix, 8, middle.row(0, tokens), y, hidden, nullptr}});
  for (int64_t t = 0; t < tokens; ++t) {
    const float scale = mix ? 1.0f / (1.0f + std::exp(-k.dot_f32(mix, h + t * hidden, hidden))) : 1.0f;
    for (int64_t i = 0; i < hidden; ++i) x[t * hidden + i] += scale * y[t * hidden + i];
  }
}

void embed(Runtime& rt, const Matrix& table, const int32_t* ids, int64_t tokens, float* x) {
  const int group = table.shape.group;
  const int64_t hidden = table.shape.cols, groups = table.shape.groups();
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t tile = ids[t] / kTileRows, lane = ids[t] % kTileRows;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t block = tile * groups + g;
      const uint16_t* affine = table.affine + block * 2 * kTileRows;
      const uint16_t pair[2] = {affine[lane], affine[kTileRows + lane]};
      float f[2];
      rt.table->to_f32(pair, f, 2);
      const float s = f[0] * 0x1p-8f, low = f[1];
      const uint8_t* codes = table.flat + block * kTileRows * group + lane * 4;
      for (int64_t i = 0; i < group && g * group + i < hidden; ++i)
        x[t * hidden + g * group + i] = low + s * (float(codes[i / 4 * kRegisterBytes + i % 4]) + 0.5f);
    }
  }
}

void project(Runtime& rt, const float* norm, float eps, const Linear& head, int64_t tokens, const float* x,
             float* logits) {
  ScratchScope scope(rt.scratch);
  const int64_t hidden = head.matrix.shape.cols, vocab = head.matrix.shape.rows;
  const int group = head.matrix.shape.group;
  QuantRows in = quant_rows(rt, tokens, hidden, group);
  float* normed = rt.scratch.get<float>(hidden);
  for (int64_t t = 0; t < tokens; ++t) {
    rms_norm(*rt.table, x + t * hidden, norm, eps, hidden, normed);
    quantize_row(rt, normed, hidden, group, in, t);
  }
  multiply(rt, {{&head.matrix, 8, in.row(0, tokens), logits, vocab, nullptr}});
}

} // namespace d2moe
