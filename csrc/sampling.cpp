#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

namespace d2moe {
namespace {

constexpr int64_t kStretch = 128, kLanes = 16, kLane = 4;
typedef float Floats __attribute__((vector_size(4 * kLane))); // the widest that every CPU has
typedef int32_t Ints __attribute__((vector_size(4 * kLane)));

// The largest of each stretch of the logits. Empty if something is not a number.
std::vector<float> tops_of(const float* x, int64_t n) {
  std::vector<float> tops;
  tops.reserve(size_t(n / kStretch + 1));
  bool odd = false;
  for (int64_t i = 0; i < n; i += kStretch) {
    const int64_t end = std::min(n, i + kStretch);
    Floats top[kLanes / kLane], v;
    Ints nan[kLanes / kLane] = {};
    for (Floats& t : top) t = Floats{} - INFINITY;
    int64_t j = i;
    for (; j + kLanes <= end; j += kLanes)
      for (int64_t r = 0; r < kLanes / kLane; ++r) {
        std::memcpy(&v, x + j + r * kLane, sizeof(v));
        top[r] = v > top[r] ? v : top[r];
        nan[r] |= v != v;
      }
    float most = -INFINITY;
    for (int64_t l = 0; l < kLanes; ++l) {
      most = std::max(most, top[l / kLane][l % kLane]);
      odd |= nan[l / kLane][l % kLane] != 0;
    }
    for (; j < end; ++j) {
      most = std::max(most, x[j]);
      odd |= x[j] != x[j];
    }
    tops.push_back(most);
  }
  if (odd) tops.clear();
  return tops;
}

// Indices, ascending, of the `count` largest logits and of those equal to the last of them.
std::vector<int64_t> largest(const float* x, int64_t n, int64_t count, const std::vector<float>& tops) {
  const auto last_of = [count](std::vector<float> values) {
    const auto last = values.begin() + (count - 1);
    std::nth_element(values.begin(), last, values.end(), std::greater<float>());
    return *last;
  };
  // So many stretches have a logit of at least this that no smaller one is wanted: few stretches of a long row are looked at.
  const float bound = count <= int64_t(tops.size()) ? last_of(tops) : -INFINITY;
  std::vector<int64_t> found;
  std::vector<float> values;
  for (size_t s = 0; s < tops.size(); ++s) {
    if (tops[s] < bound) continue;
    for (int64_t j = int64_t(s) * kStretch; j < std::min(n, int64_t(s + 1) * kStretch); ++j)
      if (x[j] >= bound) found.push_back(j), values.push_back(x[j]);
  }
  const float least = last_of(std::move(values));
  found.erase(std::remove_if(found.begin(), found.end(), [&](int64_t j) { return x[j] < least; }), found.end());
  return found;
}

// A bucket for every sixteenth of an octave; the heavier the weight, the higher its bucket.
constexpr int kBucketShift = 19, kBuckets = (0x3F800000 >> kBucketShift) + 1; // weights are 0 to 1
inline size_t bucket_of(float weight) {
  uint32_t bits;
  std::memcpy(&bits, &weight, 4);
  return std::min(size_t(bits >> kBucketShift), size_t(kBuckets - 1));
}

double sum_of(const std::vector<float>& x) {
  double lane[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= x.size(); i += kLanes)
    for (size_t l = 0; l < kLanes; ++l) lane[l] += double(x[i + l]);
  for (; i < x.size(); ++i) lane[0] += double(x[i]);
  return std::accumulate(lane, lane + kLanes, 0.0);
}

// Places, ascending, of the heaviest weights that make up top_p of all: those that less than top_p stands above. Sorts no more
// than the bucket where the sum gets there.
std::vector<int64_t> nucleus(const std::vector<float>& weights, double top_p, double least) {
  const double total = sum_of(weights), goal = top_p * total;
  // Weights below (1 - p) of the mean hold less than 1 - p of the mass all together, so all of them go; a hundredth for rounding.
  const double low = std::max(0.99 * (total - goal) / double(weights.size()), least);
  std::vector<int64_t> some;
  std::vector<double> mass(kBuckets);
  for (size_t i = 0; i < weights.size(); ++i)
    if (double(weights[i]) >= low) some.push_back(int64_t(i)), mass[bucket_of(weights[i])] += double(weights[i]);
  double above = 0.0; // mass of the heavier ones
  size_t edge = kBuckets - 1;
  for (; edge > 0 && above + mass[edge] < goal; --edge) above += mass[edge];
  std::vector<int64_t> last;
  for (const int64_t i : some)
    if (bucket_of(weights[size_t(i)]) == edge) last.push_back(i);
  std::stable_sort(last.begin(), last.end(), [&](int64_t a, int64_t b) { return weights[size_t(a)] > weights[size_t(b)]; });
  size_t taken = 0;
  for (; taken < last.size() && above < goal; ++taken) above += double(weights[size_t(last[taken])]);
  std::sort(last.begin(), last.begin() + std::ptrdiff_t(taken));
  std::vector<int64_t> kept;
  size_t next = 0;
  for (const int64_t i : some) {
    const bool edged = next < taken && last[next] == i;
    if (edged || bucket_of(weights[size_t(i)]) > edge) kept.push_back(i);
    next += edged;
  }
  return kept;
}

} // namespace

int64_t draw(const KernelTable& k, const float* logits, int64_t n, const Cuts& cuts, double uniform) {
  const std::vector<float> tops = tops_of(logits, n);
  const float top = tops.empty() ? INFINITY : *std::max_element(tops.begin(), tops.end());
  if (!std::isfinite(top)) return -1;
  std::vector<int64_t> ids; // empty: all
  if (cuts.top_k > 0 && cuts.top_k < n) ids = largest(logits, n, cuts.top_k, tops);
  std::vector<float> weights(ids.empty() ? size_t(n) : ids.size());
  const float cold = float(1.0 / cuts.temperature);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = (logits[ids.empty() ? i : size_t(ids[i])] - top) * cold;
  k.exp_sum(weights.data(), 0.0f, int64_t(weights.size()));
  const auto keep = [&](const std::vector<int64_t>& places) {
    std::vector<float> kept(places.size());
    for (size_t i = 0; i < places.size(); ++i) kept[i] = weights[size_t(places[i])];
    weights.swap(kept);
    if (ids.empty()) ids = places;
    else
      for (size_t i = 0; i < places.size(); ++i) ids[i] = ids[size_t(places[i])]; // places ascend
  };
  if (cuts.top_p < 1.0) {
    keep(nucleus(weights, cuts.top_p, cuts.min_p));
  } else if (cuts.min_p > 0.0) {
    std::vector<int64_t> places;
    for (size_t i = 0; i < weights.size(); ++i)
      if (double(weights[i]) >= cuts.min_p) places.push_back(int64_t(i));
    keep(places);
  }
  std::vector<double> sums(weights.begin(), weights.end());
  std::partial_sum(sums.begin(), sums.end(), sums.begin());
  const auto place = std::upper_bound(sums.begin(), sums.end(), uniform * sums.back());
  // Rounding can put the draw on the very end; the last token with any weight is the answer then.
  const auto last = std::lower_bound(sums.begin(), sums.end(), sums.back());
  const auto drawn = std::min(place, last) - sums.begin();
  return ids.empty() ? drawn : ids[size_t(drawn)];
}

} // namespace d2moe
