#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

namespace d2moe {
namespace {

constexpr int64_t kStretch = 128, kLanes = 16;

// The largest of each stretch of the logits, in vectors. Empty if something is not a number.
std::vector<float> tops_of(const float* x, int64_t n) {
  std::vector<float> tops;
  tops.reserve(size_t(n / kStretch + 1));
  for (int64_t i = 0; i < n; i += kStretch) {
    const int64_t end = std::min(n, i + kStretch);
    float top[kLanes];
    int32_t odd[kLanes] = {};
    std::fill(top, top + kLanes, -INFINITY);
    const auto see = [&](int64_t l, float v) {
      top[l] = v > top[l] ? v : top[l];
      odd[l] |= v != v;
    };
    int64_t j = i;
    for (; j + kLanes <= end; j += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) see(l, x[j + l]);
    for (; j < end; ++j) see(0, x[j]);
    if (std::accumulate(odd, odd + kLanes, 0)) return {};
    tops.push_back(*std::max_element(top, top + kLanes));
  }
  return tops;
}

// Indices, ascending, of the `count` largest logits and of those equal to the last of them.
std::vector<int64_t> largest(const float* x, int64_t n, int64_t count, const std::vector<float>& tops) {
  std::vector<float> heap; // of the largest so far, the least on top; few logits of a long row get into it
  heap.reserve(size_t(count));
  const auto stretch = [&](size_t s, auto&& f) {
    for (int64_t j = int64_t(s) * kStretch; j < std::min(n, int64_t(s + 1) * kStretch); ++j) f(j);
  };
  for (size_t s = 0; s < tops.size(); ++s) {
    if (int64_t(heap.size()) == count && tops[s] <= heap.front()) continue;
    stretch(s, [&](int64_t j) {
      if (int64_t(heap.size()) == count) {
        if (x[j] <= heap.front()) return;
        std::pop_heap(heap.begin(), heap.end(), std::greater<float>());
        heap.pop_back();
      }
      heap.push_back(x[j]);
      std::push_heap(heap.begin(), heap.end(), std::greater<float>());
    });
  }
  std::vector<int64_t> found;
  for (size_t s = 0; s < tops.size(); ++s)
    if (tops[s] >= heap.front())
      stretch(s, [&](int64_t j) {
        if (x[j] >= heap.front()) found.push_back(j);
      });
  return found;
}

// Keeps the likeliest tokens that make up top_p of all weight, likeliest first.
void keep_top_p(double top_p, double least, std::vector<int64_t>& ids, std::vector<double>& weights) {
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  // Tokens below (1 - p) of the mean weight hold less than 1 - p of the mass all together, so all of them go.
  least = std::max((1.0 - top_p) * total / double(weights.size()), least);
  std::vector<size_t> order;
  for (size_t i = 0; i < weights.size(); ++i)
    if (weights[i] >= least) order.push_back(i);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return weights[a] > weights[b]; });
  std::vector<int64_t> kept_ids;
  std::vector<double> kept;
  double above = 0.0; // mass of the likelier ones
  for (size_t i : order) {
    if (!kept.empty() && above >= top_p * total) break;
    kept_ids.push_back(ids[i]);
    kept.push_back(weights[i]);
    above += weights[i];
  }
  ids.swap(kept_ids);
  weights.swap(kept);
}

} // namespace

int64_t draw(const float* logits, int64_t n, const Cuts& cuts, double uniform) {
  const std::vector<float> tops = tops_of(logits, n);
  const float top = tops.empty() ? INFINITY : *std::max_element(tops.begin(), tops.end());
  if (!std::isfinite(top)) return -1;
  std::vector<int64_t> ids;
  if (cuts.top_k > 0 && cuts.top_k < n) {
    ids = largest(logits, n, cuts.top_k, tops);
  } else {
    ids.resize(size_t(n));
    std::iota(ids.begin(), ids.end(), 0);
  }
  std::vector<double> weights(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) weights[i] = std::exp((double(logits[ids[i]]) - double(top)) / cuts.temperature);
  if (cuts.top_p < 1.0) {
    keep_top_p(cuts.top_p, cuts.min_p, ids, weights);
  } else if (cuts.min_p > 0.0) {
    size_t kept = 0;
    for (size_t i = 0; i < ids.size(); ++i)
      if (weights[i] >= cuts.min_p) ids[kept] = ids[i], weights[kept++] = weights[i];
    ids.resize(kept);
    weights.resize(kept);
  }
  std::partial_sum(weights.begin(), weights.end(), weights.begin());
  const auto place = std::upper_bound(weights.begin(), weights.end(), uniform * weights.back());
  // Rounding can put the draw on the very end; the last token with any weight is the answer then.
  const auto last = std::lower_bound(weights.begin(), weights.end(), weights.back());
  return ids[size_t(std::min(place, last) - weights.begin())];
}

} // namespace d2moe
