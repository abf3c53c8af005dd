// Additions and subtractions of pairs only, so that every width of registers gives the same bits.
#include "rotate.h"

#include "vectors.h"

namespace d2moe {
namespace {

// The lane whose number differs in the bit kStep changes places with this one.
template <int kStep> D2MOE_INLINE Floats swapped(Floats v) {
#define D2MOE_LANES \
  0 ^ kStep, 1 ^ kStep, 2 ^ kStep, 3 ^ kStep, 4 ^ kStep, 5 ^ kStep, 6 ^ kStep, 7 ^ kStep, 8 ^ kStep, 9 ^ kStep, 10 ^ kStep, 11 ^ kStep, \
      12 ^ kStep, 13 ^ kStep, 14 ^ kStep, 15 ^ kStep
#if defined(__clang__)
  return __builtin_shufflevector(v, v, D2MOE_LANES);
#else
  return __builtin_shuffle(v, Ints{D2MOE_LANES});
#endif
}

// Lanes without the bit: a + b of the pair; lanes with it: a - b, as b is theirs.
template <int kStep> D2MOE_INLINE Floats within(Floats v) {
  Floats sign;
  for (int i = 0; i < kLanes; ++i) sign[i] = i & kStep ? -1.0f : 1.0f;
  return swapped<kStep>(v) + sign * v;
}

} // namespace

D2MOE_CLONES
void rotate(float* x, int64_t n, int span) {
  for (float* end = x + n / span * span; x < end; x += span) {
    for (int i = 0; i < span; i += kLanes) store(x + i, within<8>(within<4>(within<2>(within<1>(load(x + i))))));
    for (int step = kLanes; step < span; step *= 2)
      for (int first = 0; first < span; first += 2 * step)
        for (int i = first; i < first + step; i += kLanes) {
          const Floats a = load(x + i), b = load(x + i + step);
          store(x + i, a + b);
          store(x + i + step, a - b);
        }
  }
}

} // namespace d2moe
