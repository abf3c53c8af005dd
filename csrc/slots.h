// Slot memory for planes. Two arenas, one of base slots and one of plane slots, each a reserved mapping that is
// committed slot by slot; a slot that is free stays committed for the next read until the limit asks for its pages.
// With a limit of kHugeLimit and more they are in huge pages where the system has them, until the first slot is given back: small pages
// cost bandwidth. Slots are committed in order, so that takes at most a huge page an arena beyond the limit.
#pragma once
#include <cstdint>
#include <vector>

namespace d2moe {

constexpr int64_t kHugeLimit = int64_t(256) << 20;
constexpr int64_t kMostMoved = 16384; // slots with which pages are moved: each may become a mapping of its own, and a process has 65,530

class Slots {
public:
  // Up to `base_count` slots of base_bytes and `plane_count` of plane_bytes (address space only).
  Slots(int64_t base_bytes, int64_t base_count, int64_t plane_bytes, int64_t plane_count);
  ~Slots();
  Slots(const Slots&) = delete;
  Slots& operator=(const Slots&) = delete;

  // Bytes that may be resident; shrinking gives free slots back to the system at once. Throws std::runtime_error if
  // the slots in use alone are more.
  void set_limit(int64_t bytes);
  // A slot's memory; throws std::runtime_error when the limit leaves no room (the plan was wrong).
  uint8_t* take_base() { return take(base_); }
  uint8_t* take_plane() { return take(plane_); }
  void free_base(uint8_t* p) { give(base_, p); }
  void free_plane(uint8_t* p) { give(plane_, p); }
  int64_t used_bytes() const { return base_.used * base_.bytes + plane_.used * plane_.bytes; }
  int64_t committed_bytes() const { return base_.committed * base_.bytes + plane_.committed * plane_.bytes; }

private:
  struct Arena {
    uint8_t* memory = nullptr;
    int64_t bytes = 0, count = 0, fresh = 0; // fresh: slots from here on were never taken
    int64_t used = 0, committed = 0;
    std::vector<uint8_t*> warm, cold; // free with and without pages behind them
  };
  static void reserve(Arena& a, int64_t bytes, int64_t count);
  void use_huge(bool on); // for pages that are committed from now on
  uint8_t* take(Arena& a);
  void give(Arena& a, uint8_t* p);
  bool cool(Arena& a); // gives one free slot's pages back
  // The pages of a free slot go to one of the other kind; false where they cannot. Fresh pages have to be zeroed, which takes longer than
  // a read, and where widths differ slots of the two kinds change places all the time.
  bool move_pages(uint8_t* from, uint8_t* to, int64_t bytes);
  uint8_t* unused(Arena& a); // a slot without pages, or null
  Arena base_, plane_;
  int64_t limit_ = 0;
  bool huge_ = false, cooled_ = false;
};

} // namespace d2moe
