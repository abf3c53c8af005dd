// Compiled form of planes.py: from float weights to codes and scales in storage order. One definition for every CPU.
#pragma once
#include "layout.h"

namespace d2moe {

// The clip search. planes.py has the same numbers (CLIPS, SEARCH_WIDTHS) and the reasons for them.
constexpr int kClips = 12;
constexpr double kClipStep = 0.04; // clip i keeps float32(1 - i * kClipStep) of the range
constexpr int kSearchWidths[] = {2, 3, 4, 8};

// Rows of tiles [tile0, tile1) of w f32 [rows, cols]; `tiles` u8 [tiles, groups, group/4, 64] and `affine` f16
// [tiles, groups, 2, 16] are those of the whole matrix. Padding takes part in no fit and is written as zeros.
void encode_rows(const float* w, int64_t rows, int64_t cols, int group, int64_t tile0, int64_t tile1, uint8_t* tiles,
                 uint16_t* affine);

// Registers [unit0, unit1) in units of 8 (512 bytes of `tiles`) to 128 bytes of `base` and 64 of each of 6 planes.
void pack_units(const uint8_t* tiles, int64_t unit0, int64_t unit1, uint8_t* base, uint8_t* const* planes);

} // namespace d2moe
