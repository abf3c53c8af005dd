// Compiled form of planes.quantize: from float weights to codes and scales in storage order. One definition for every CPU.
#pragma once
#include "layout.h"

namespace d2moe {

// Rows of tiles [tile0, tile1) of w f32 [rows, cols]; `tiles` u8 [tiles, groups, group/4, 64], `affine` u8
// [tiles, groups, 2, 16] and `row_scale` f32 [tiles, 16] are those of the whole matrix. Padding is written as zeros.
void encode_rows(const float* w, int64_t rows, int64_t cols, int group, int64_t tile0, int64_t tile1, uint8_t* tiles,
                 uint8_t* affine, float* row_scale);

// Registers [unit0, unit1) in units of 8 (512 bytes of `tiles`) to 128 bytes of `base` and 64 of each of 6 planes.
void pack_units(const uint8_t* tiles, int64_t unit0, int64_t unit1, uint8_t* base, uint8_t* const* planes);

} // namespace d2moe
