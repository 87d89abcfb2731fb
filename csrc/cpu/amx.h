// What the LDTILECFG instruction reads (Intel SDM, "Palette 1"): up to 8 tiles of up to 16 rows of 64 bytes.
#pragma once
#include <cstdint>

namespace vgg_fast {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "the instruction reads 64 bytes");

}  // namespace vgg_fast
