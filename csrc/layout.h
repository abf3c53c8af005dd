// Storage order of nested weights, in memory and on disk. Constants only; planes.py and docs/format.md define the same.
#pragma once
#include <cstddef>
#include <cstdint>

namespace d2moe {

constexpr int kTileRows = 16;      // output rows stored side by side
constexpr int kRegisterBytes = 64; // 16 rows x 4 columns of one-byte codes
constexpr int kBaseBits = 2;
constexpr int kMaxBits = 8;
constexpr int kPlanes = kMaxBits - kBaseBits; // one-bit planes after the base: bits 3..8
constexpr int64_t kAlign = 4096;              // direct I/O granularity
// Where register f of eight sits in a byte of a plane. Even bits first: then two planes become four 2-bit fields like the
// base's in two shifts, and 2-bit fields become nibbles in two more.
constexpr int kPlaneBit[8] = {0, 2, 4, 6, 1, 3, 5, 7};

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Move { // of an expert's planes
  int32_t layer, expert, bits; // that stay, or to have
};

// One matrix: `rows` x `cols` padded to whole tiles and whole groups.
struct MatrixShape {
  int64_t rows = 0, cols = 0; // as the model sees them
  int group = 64;
  int64_t tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  int64_t groups() const { return (cols + group - 1) / group; }
  int64_t blocks() const { return tiles() * groups(); }
  int64_t codes() const { return blocks() * kTileRows * group; }
  int64_t base_bytes() const { return codes() / 4; }                  // [tiles, groups, group/16, 64] u8, two bits a weight
  int64_t plane_bytes() const { return codes() / 8; }                 // [tiles, groups, group/32, 64] u8, one bit a weight
  int64_t affine_bytes() const { return blocks() * 2 * kTileRows; }   // [tiles, groups, 2, 16] u8: step, zero
  int64_t row_scale_bytes() const { return tiles() * kTileRows * 4; } // [tiles, 16] f32
};

static_assert(kTileRows * 4 == kRegisterBytes, "a register is 16 rows of 4 columns");

} // namespace d2moe
