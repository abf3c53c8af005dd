// Vectors of 16 floats that compilers cut into registers, for code that is one source for all instruction sets: functions marked
// D2MOE_CLONES have one version for each width of registers, chosen when the program is loaded; all give the same bits.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__) // which the choice would come before
#define D2MOE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define D2MOE_CLONES
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" // vectors are passed to inline functions only
#endif
#define D2MOE_INLINE inline __attribute__((always_inline))

namespace d2moe {
namespace {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

D2MOE_INLINE Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
D2MOE_INLINE void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

} // namespace
} // namespace d2moe
