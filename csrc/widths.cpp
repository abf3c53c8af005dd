#include "widths.h"

#include <algorithm>
#include <cmath>

namespace d2moe {

void choose_widths(Runtime& rt, const WidthRouter* router, int64_t hidden, int64_t tokens, int64_t top_k, const float* x,
                   const float* h, const int32_t* ids, const float* gates, const Dials& dials, int32_t* bits) {
  constexpr float kTiny = 1e-30f; // keeps logarithms finite
  rt.pool.parallel_for(tokens, 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const int32_t least = dials.least[t], most = dials.most[t];
      int32_t* out = bits + t * top_k;
      std::fill(out, out + top_k, least);
      if (least == most || !router) continue;
      const float size = rt.table->sum_squares(x + t * hidden, hidden) / float(hidden);
      const float token = router->norm_power * std::log(std::max(size, kTiny));
      for (int64_t k = 0; k < top_k; ++k) {
        const int64_t e = ids[t * top_k + k];
        float value = token + router->gate_power * std::log(std::max(gates[t * top_k + k], kTiny));
        if (router->weight) value += rt.table->dot_f32(router->weight + e * hidden, h + t * hidden, hidden);
        if (router->base && value + router->base[e] < dials.price[t]) {
          out[k] = 0;
          continue;
        }
        const float* planes = router->planes + e * kPlanes;
        while (out[k] < most && value + planes[out[k] - kBaseBits] >= dials.price[t]) ++out[k];
      }
    }
  });
}

} // namespace d2moe
