// Which kernel table runs: CPU and OS features, asked once; D2MOE_KERNELS=scalar|avx2|avx512|neon forces one.
#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(D2MOE_SCALAR_ONLY)
#elif defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace d2moe {

const KernelTable* kernel_table(const char* name) {
  if (!std::strcmp(name, "scalar")) return &kScalarTable;
#if defined(D2MOE_SCALAR_ONLY)
#elif defined(__x86_64__)
  // __builtin_cpu_supports also asks the OS (XGETBV) whether it saves the wide registers.
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0; // clang 14 has no name for f16c: leaf 1, ecx bit 29
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!std::strcmp(name, "avx2") && avx2) return &kAvx2Table;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (!std::strcmp(name, "avx512") && avx512) return &kAvx512Table;
#elif defined(__aarch64__)
  const bool dotprod = getauxval(AT_HWCAP) >> 20 & 1; // HWCAP_ASIMDDP, as the kernel defines it; older headers lack the name
  if (!std::strcmp(name, "neon") && dotprod) return &kNeonTable;
#endif
  return nullptr;
}

namespace {

const KernelTable* find_best() {
  if (const char* forced = std::getenv("D2MOE_KERNELS"); forced && *forced) {
    if (const KernelTable* t = kernel_table(forced)) return t;
    throw std::runtime_error(std::string("D2MOE_KERNELS=") + forced +
                             ": this build or this CPU has no such kernel table; known are scalar, avx2, avx512, neon");
  }
  const KernelTable* best = &kScalarTable;
  for (const char* name : kTableNames)
    if (const KernelTable* t = kernel_table(name)) best = t;
  return best;
}

} // namespace

// Once: a virtual machine leaves to its host for every answer of CPUID, which takes longer than drawing a token.
const KernelTable* best_kernel_table() {
  static const KernelTable* const best = find_best();
  return best;
}

} // namespace d2moe
