#include "dense.h"

#include "rotate.h"

#include <algorithm>
#include <cmath>

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

void inner_row(Runtime& rt, float* gate, const float* up, int64_t n, int group, int rotation, QuantRows& out, int64_t i) {
  rt.table->silu_mul(gate, up, n);
  if (rotation) rotate(gate, n, rotation);
  quantize_row(rt, gate, n, group, out, i);
}

float rms_scale(const KernelTable& k, const float* x, float eps, int64_t n) {
  return 1.0f / std::sqrt(k.sum_squares(x, n) / float(n) + eps);
}

void rms_norm(const KernelTable& k, const float* x, const float* weight, float eps, int64_t n, float* y) {
  const float scale = rms_scale(k, x, eps, n);
  for (int64_t i = 0; i < n; ++i) y[i] = weight[i] * (x[i] * scale);
}

void add_rows(Runtime& rt, const float* y, int64_t tokens, int64_t n, float* x) {
  rt.pool.parallel_for(tokens * n, 1 << 14, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) x[i] += y[i];
  });
}

void tally(Runtime& rt, const std::vector<Product>& products) {
  if (!rt.counting) return;
  for (const Product& p : products) {
    auto& [count, tokens] = rt.tally[{p.matrix->shape.rows, p.matrix->shape.cols, p.bits, rt.table->variant(p.bits, p.x.m)}];
    ++count;
    tokens += p.x.m;
  }
}

void multiply_tiles(const KernelTable& k, const Product& p, int64_t begin, int64_t end) {
  k.matmul(*p.matrix, p.bits, p.x, begin, end, p.y, p.ldy);
  if (p.bias)
    for (int64_t i = 0; i < p.x.m; ++i)
      for (int64_t r = begin * kTileRows; r < std::min(end * kTileRows, p.matrix->shape.rows); ++r) p.y[i * p.ldy + r] += p.bias[r];
}

void multiply(Runtime& rt, const std::vector<Product>& products) {
  tally(rt, products);
  int64_t total = 0;
  for (const Product& p : products) total += p.matrix->shape.tiles();
  rt.pool.parallel_for(total, 4, [&](int64_t begin, int64_t end, int) {
    int64_t first = 0;
    for (const Product& p : products) {
      const int64_t tiles = p.matrix->shape.tiles();
      const int64_t a = std::max(begin - first, int64_t(0)), b = std::min(end - first, tiles);
      if (a < b) multiply_tiles(*rt.table, p, a, b);
      first += tiles;
      if (first >= end) break;
    }
  });
}

void route(Runtime& rt, const RouterWeights& w, int64_t tokens, const float* x, float* h, int32_t* ids, float* gates) {
  rt.pool.parallel_for(tokens, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) rms_norm(*rt.table, x + t * w.hidden, w.norm, w.eps, w.hidden, h + t * w.hidden);
  });
  pick(rt, w, tokens, h, ids, gates);
}

void pick(Runtime& rt, const RouterWeights& w, int64_t tokens, const float* h, int32_t* ids, float* gates) {
  ScratchScope scope(rt.scratch);
  const KernelTable& k = *rt.table;
  const int64_t hidden = w.hidden, experts = w.experts;
  float* logits = rt.scratch.get<float>(tokens * experts);
  rt.pool.parallel_for(tokens * experts, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      logits[i] = k.dot_f32(w.weight + i % experts * hidden, h + i / experts * hidden, hidden);
  });
  rt.pool.parallel_for(tokens, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      float* l = logits + t * experts;
      const float largest = *std::max_element(l, l + experts);
      float sum = 0.0f;
      for (int64_t e = 0; e < experts; ++e) sum += l[e] = std::exp(l[e] - largest);
      float chosen = 0.0f;
      for (int64_t i = 0; i < w.top_k; ++i) {
        const int64_t e = std::max_element(l, l + experts) - l;
        ids[t * w.top_k + i] = int32_t(e);
        gates[t * w.top_k + i] = l[e] / sum;
        chosen += gates[t * w.top_k + i];
        l[e] = -1.0f;
      }
      if (w.normalise)
        for (int64_t i = 0; i < w.top_k; ++i) gates[t * w.top_k + i] /= chosen;
    }
  });
}

void feed_forward(Runtime& rt, const FeedForwardWeights& w, int64_t tokens, float* h, float* x) {
  ScratchScope scope(rt.scratch);
  const KernelTable& k = *rt.table;
  const int64_t hidden = w.gate.matrix.shape.cols, inner = w.gate.matrix.shape.rows;
  const int group = w.gate.matrix.shape.group;
  QuantRows in = quant_rows(rt, tokens, hidden, group);
  rt.pool.parallel_for(tokens, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      if (w.norm) rms_norm(k, x + t * hidden, w.norm, w.eps, hidden, h + t * hidden);
      quantize_row(rt, h + t * hidden, hidden, group, in, t);
    }
  });
  float* g = rt.scratch.get<float>(tokens * inner);
  float* u = rt.scratch.get<float>(tokens * inner);
  const Activations rows = in.row(0, tokens);
  multiply(rt, {product(w.gate, rows, g), product(w.up, rows, u)});
  QuantRows middle = quant_rows(rt, tokens, inner, group);
  rt.pool.parallel_for(tokens, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) inner_row(rt, g + t * inner, u + t * inner, inner, group, w.rotation, middle, t);
  });
  float* y = rt.scratch.get<float>(tokens * hidden);
  multiply(rt, {product(w.down, middle.row(0, tokens), y)});
  rt.pool.parallel_for(tokens, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const float scale = w.mix ? 1.0f / (1.0f + std::exp(-k.dot_f32(w.mix, h + t * hidden, hidden))) : 1.0f;
      for (int64_t i = 0; i < hidden; ++i) x[t * hidden + i] += scale * y[t * hidden + i];
    }
  });
}

void embed(Runtime& rt, const Linear& table, const int32_t* ids, int64_t tokens, float* x) {
  const Matrix& w = table.matrix;
  const int group = w.shape.group;
  const int64_t cols = w.shape.cols, groups = w.shape.groups();
  const float half = std::ldexp(1.0f, 7 - table.bits);
  rt.pool.parallel_for(tokens, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t tile = ids[t] / kTileRows, lane = ids[t] % kTileRows;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t block = tile * groups + g;
        const uint8_t* affine = w.affine + block * 2 * kTileRows;
        const float s = w.row_scale[tile * kTileRows + lane] * float(affine[lane]);
        const float offset = half - float(affine[kTileRows + lane]);
        for (int64_t i = 0; i < group && g * group + i < cols; ++i) {
          const int64_t reg = i / 4, byte = lane * 4 + i % 4;
          int code = (w.base[block * group * 4 + reg / 4 * 64 + byte] >> (2 * (reg % 4)) & 3) << 6;
          for (int p = 0; p < table.bits - kBaseBits; ++p)
            code |= (w.planes[p][block * group * 2 + reg / 8 * 64 + byte] >> kPlaneBit[reg % 8] & 1) << (5 - p);
          x[t * cols + g * group + i] = s * (float(code) + offset);
        }
      }
    }
  });
}

void project(Runtime& rt, const float* norm, float eps, const Linear& head, int64_t tokens, const float* x, float* logits) {
  ScratchScope scope(rt.scratch);
  const int64_t hidden = head.matrix.shape.cols;
  const int group = head.matrix.shape.group;
  QuantRows in = quant_rows(rt, tokens, hidden, group);
  float* normed = rt.scratch.get<float>(rt.pool.size() * hidden);
  rt.pool.parallel_for(tokens, 4, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t t = begin; t < end; ++t) {
      rms_norm(*rt.table, x + t * hidden, norm, eps, hidden, normed + thread * hidden);
      quantize_row(rt, normed + thread * hidden, hidden, group, in, t);
    }
  });
  multiply(rt, {product(head, in.row(0, tokens), logits)});
}

} // namespace d2moe
