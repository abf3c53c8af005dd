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

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One matrix: `rows` x `cols` padded to whole tiles and whole groups.
struct MatrixShape {
  int64_t rows = 0, cols = 0; // as the model sees them
  int group = 64;
  int64_t tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  int64_t groups() const { return (cols + group - 1) / group; }
  int64_t blocks() const { return tiles() * groups(); }
  int64_t affine_bytes() const { return blocks() * 2 * kTileRows * 2; }        // [tiles, groups, 2, 16] f16
  int64_t flat_bytes() const { return blocks() * kTileRows * group; }          // one byte a weight
  int64_t base_bytes() const { return flat_bytes() / 4; }                      // two bits a weight
  int64_t plane_bytes() const { return flat_bytes() / 8; }                     // one bit a weight
};

static_assert(kTileRows * 4 == kRegisterBytes, "a register is 16 rows of 4 columns");

} // namespace d2moe
