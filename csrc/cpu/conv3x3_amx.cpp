// bf16 on AMX. The rows of a chunk are one flat line of pixels, (w + 2) to a row: 16 neighbouring pixels of a
// channel block are 1 KB in one piece, and every tap is a constant offset. The two border columns between
// rows cost a little work whose results are dropped.
//
//   tiles  0-3  accumulators  [2 x 16 pixels] x [2 x 16 channels], fp32
//          4,5  x             [16 pixels][16 words]
//          6,7  weights       [16 words][16 channels], two bf16 each (VNNI)
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#include "../conv3x3.h"

#define VGG_TARGET __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq")))

namespace vgg_fast {
namespace {

#include "conv3x3_rows.inl"
#include "isa_avx512.inl"

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int64_t kTile = 16;  // pixels or channels of a tile
constexpr int64_t kGroup = Avx512::kGroup;

// 32 pixels x 32 channels of raw accumulators, [pixel][kGroup]. The four loads come first, then the four
// products: interleaving them was measured to be slower (docs/performance.md).
template <int kTapsPerBlock>
VGG_TARGET inline void accumulate_tiles(const Conv3x3Args& a, const char* x, const uint32_t* weight, float* out) {
  const int64_t row = (a.w + 2) * kLine, block = (a.h + 2) * row;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t b = 0; b < a.cin_blocks; ++b, x += block) {
#pragma GCC unroll 9
    for (int tap = 0; tap < kTapsPerBlock; ++tap, weight += kWords * kGroup) {
      const char* pixels = x + (tap / 3) * row + (tap % 3) * kLine;
      _tile_loadd(4, pixels, kLine);
      _tile_loadd(5, pixels + kTile * kLine, kLine);
      _tile_loadd(6, weight, kGroup * 4);
      _tile_loadd(7, weight + kTile, kGroup * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, kGroup * 4);
  _tile_stored(1, out + kTile, kGroup * 4);
  _tile_stored(2, out + kTile * kGroup, kGroup * 4);
  _tile_stored(3, out + kTile * kGroup + kTile, kGroup * 4);
}

}  // namespace

VGG_TARGET void conv3x3_amx_bf16(const Conv3x3Args& a, int64_t group, int64_t row_begin, int64_t row_end,
                                 float* scratch) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t pitch = a.w + 2;
  const uint32_t* weight = a.weight + group * a.cin_blocks * a.taps * kWords * kGroup;
  const char* x = a.x + row_begin * pitch * kLine;
  const int64_t pixels = (row_end - row_begin - 1) * pitch + a.w;
  for (int64_t p = 0; p < pixels; p += 2 * kTile) {
    if (a.taps == kTaps) {
      accumulate_tiles<kTaps>(a, x + p * kLine, weight, scratch + p * kGroup);
    } else {
      accumulate_tiles<1>(a, x + p * kLine, weight, scratch + p * kGroup);
    }
  }
  _tile_release();
  const int64_t step = pitch * kGroup;
  if (a.pool) {
    for (int64_t row = row_begin; row + 1 < row_end; row += 2, scratch += 2 * step) {
      epilogue_row<Avx512, true>(a, group, row / 2, scratch, scratch + step);
    }
  } else {
    for (int64_t row = row_begin; row < row_end; ++row, scratch += step) {
      epilogue_row<Avx512, false>(a, group, row, scratch, nullptr);
    }
  }
}

}  // namespace vgg_fast
#endif
