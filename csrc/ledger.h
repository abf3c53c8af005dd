// What is in memory, what planes are worth, and the plan of a layer call: compiled form of d2moe/policy/ledger.py and of
// d2moe/policy/hebf.py, whose docstrings are the definition.
#pragma once
#include "layout.h"

#include <stdexcept>
#include <vector>

namespace d2moe {

constexpr int kSegments = kPlanes + 1; // the base and the planes after it

// The limit does not hold even one expert at its width.
struct NoRoom : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One step of a layer call: evict, then start reading, in order, then compute.
struct Wave {
  std::vector<Move> evict, read;
  std::vector<int32_t> experts; // to compute
  int64_t read_bytes = 0;
};

class Ledger {
public:
  Ledger(int64_t layers, int64_t experts, int64_t base_bytes, int64_t plane_bytes, int64_t limit_bytes, double fade, double last_call);

  // Notes calls of the layers from `first` on: ids and bits i32 [count, tokens, top_k]. They are worked into the values later.
  void touch(int64_t first, int64_t count, int64_t tokens, int64_t top_k, const int32_t* ids, const int32_t* bits);
  // Works what was noted into what planes are worth.
  void value();
  // The expert has `bits`.
  void set(int64_t layer, int64_t expert, int bits);
  // Takes the least valuable planes until n_bytes more fit; experts of `layer` marked in pinned u8 [experts] stay. Adds the experts that
  // lost something to `out`, in the order in which they first did. False, and nothing changed, if all others are not enough.
  bool make_room(int64_t n_bytes, int64_t layer, const uint8_t* pinned, std::vector<Move>& out);
  // The waves of a call with ids and bits i32 [tokens, top_k], which `asked` stands for in the values. Throws NoRoom.
  std::vector<Wave> plan(int64_t layer, int64_t tokens, int64_t top_k, const int32_t* ids, const int32_t* bits, const int32_t* asked);

  const int64_t layers, experts;
  int64_t used_bytes = 0, limit_bytes;
  double turn = 0.0;                            // added to a layer's worth for each layer until it comes again
  int64_t prefix[kMaxBits + 1];                 // bytes of an expert by its width
  std::vector<int32_t> width;                   // [layers, experts]
  std::vector<double> demand, worth;            // [layers, experts, kSegments]
  std::vector<double> tokens_seen;              // [layers]

private:
  struct Note {
    int64_t first, count, tokens, top_k;
    std::vector<int32_t> ids, bits;
  };
  struct Item {
    int32_t expert, bits, count;
  };
  struct Head { // the highest plane of an expert; the one that goes first is the greatest
    double turned, worth;
    int32_t layer, place; // expert * kSegments + plane
    bool operator<(const Head& o) const;
  };
  void value(const Note& note);
  Head head(int64_t layer, int64_t expert, int64_t pinned_layer) const;
  std::vector<Item> items(int64_t pairs, int64_t tokens, const int32_t* ids, const int32_t* bits);
  bool wave(int64_t layer, const Item* items, size_t count, const uint8_t* pinned, Wave& out);

  const double fade_, last_call_;
  std::vector<Note> noted_;
  std::vector<double> once_; // the demand of one call [experts, kSegments]
  std::vector<Head> heads_;
  std::vector<int32_t> found_; // of each expert, where it is among what was found, or -1 between uses
};

} // namespace d2moe
