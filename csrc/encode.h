// Compiled version of planes.fit and planes.encode.
#pragma once
#include "layout.h"

namespace d2moe {

// Codes in register order u8 [tiles, groups, group/4, 64] and affine f16 [tiles, groups, 2, 16] of tiles [tile0, tile1).
void encode_rows(const float* w, int64_t rows, int64_t cols, int group, int64_t tile0, int64_t tile1, uint8_t* tiles,
                 uint16_t* affine);

} // namespace d2moe
