#include "slots.h"

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>
#include <sys/mman.h>

namespace d2moe {

void Slots::reserve(Arena& a, int64_t bytes, int64_t count) {
  a.bytes = bytes;
  a.count = count;
  void* p = mmap(nullptr, size_t(bytes * count), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                 -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  a.memory = static_cast<uint8_t*>(p);
}

Slots::Slots(int64_t base_bytes, int64_t base_count, int64_t plane_bytes, int64_t plane_count) {
  reserve(base_, base_bytes, base_count);
  reserve(plane_, plane_bytes, plane_count);
}

Slots::~Slots() {
  for (Arena* a : {&base_, &plane_})
    if (a->memory) munmap(a->memory, size_t(a->bytes * a->count));
}

void Slots::use_huge(bool on) {
  if (on == huge_) return;
  huge_ = on;
#if defined(MADV_HUGEPAGE)
  for (Arena* a : {&base_, &plane_})
    if (a->count) madvise(a->memory, size_t(a->bytes * a->count), on ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
}

bool Slots::cool(Arena& a) {
  if (a.warm.empty()) return false;
  cooled_ = true;
  use_huge(false); // or the kernel would fill the gap again
  uint8_t* p = a.warm.back();
  a.warm.pop_back();
  madvise(p, size_t(a.bytes), MADV_DONTNEED);
  a.cold.push_back(p);
  --a.committed;
  return true;
}

bool Slots::move_pages(uint8_t* from, uint8_t* to, int64_t bytes) {
#if defined(__linux__) && defined(MREMAP_DONTUNMAP)
  if (base_.fresh + plane_.fresh > kMostMoved) return false;
  use_huge(false); // or the kernel would fill the gap again
  if (mremap(from, size_t(bytes), size_t(bytes), MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to) == to) return true;
  // A kernel before 5.7, or no memory for the mapping; what was there may be gone.
  if (mmap(to, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
    throw std::bad_alloc();
#endif
  return false;
}

uint8_t* Slots::unused(Arena& a) {
  if (!a.cold.empty()) {
    uint8_t* p = a.cold.back();
    a.cold.pop_back();
    return p;
  }
  return a.fresh == a.count ? nullptr : a.memory + a.bytes * a.fresh++;
}

void Slots::set_limit(int64_t bytes) {
  if (used_bytes() > bytes)
    throw std::runtime_error("the slots in use hold " + std::to_string(used_bytes()) + " bytes, more than the new limit of " +
                             std::to_string(bytes) + "; evict first");
  limit_ = bytes;
  use_huge(bytes >= kHugeLimit && !cooled_);
  while (committed_bytes() > limit_ && (cool(plane_) || cool(base_))) {
  }
}

uint8_t* Slots::take(Arena& a) {
  uint8_t* p = nullptr;
  if (!a.warm.empty()) {
    p = a.warm.back();
    a.warm.pop_back();
  } else {
    Arena& other = &a == &base_ ? plane_ : base_;
    const int64_t least = committed_bytes() + a.bytes - limit_;
    const int64_t donors = least > 0 ? (least + other.bytes - 1) / other.bytes : 0;
    if (donors > int64_t(other.warm.size()))
      throw std::runtime_error("no slot of " + std::to_string(a.bytes) + " bytes is left: " + std::to_string(used_bytes()) + " of " +
                               std::to_string(limit_) + " bytes are in use");
    p = unused(a);
    if (!p) throw std::runtime_error("all " + std::to_string(a.count) + " slots are in use");
    for (int64_t i = 0, at = 0; i < donors; ++i) {
      uint8_t* donor = other.warm.back();
      int64_t given = std::min(a.bytes - at, other.bytes);
      if (given > 0 && move_pages(donor, p + at, given)) {
        at += given;
        while (other.bytes - given >= a.bytes) { // a base's pages are enough for more than one plane
          uint8_t* more = unused(a);
          if (!more) break;
          move_pages(donor + given, more, a.bytes);
          given += a.bytes;
          a.warm.push_back(more);
          ++a.committed;
        }
      }
      cool(other); // with what is left
    }
    ++a.committed;
  }
  ++a.used;
  return p;
}

void Slots::give(Arena& a, uint8_t* p) {
  --a.used;
  a.warm.push_back(p);
}

} // namespace d2moe
