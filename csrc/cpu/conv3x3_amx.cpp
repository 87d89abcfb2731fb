// bf16 on AMX, and fp32 as sums of bf16 values. The rows of a chunk are one flat line of pixels, (w + 2) to a row: 16
// neighbouring pixels of a channel block are 1 KB in one piece, and every tap is a constant offset. The two border
// columns between rows cost a little work whose results are dropped.
//
//   tiles  0-3  accumulators  [2 x 16 pixels] x [2 x 16 channels], fp32
//          4,5  x             [16 pixels][16 words]
//          6,7  weights       [16 words][16 channels], two bf16 each (VNNI)
//
// With x = x1 + x2 + x3 and w = w1 + w2 + w3, two parts give x1 w1 + x1 w2 + x2 w1 (what is left out is 2^-18 of a
// product), three parts add x1 w3 + x2 w2 + x3 w1 (2^-26: below the rounding of fp32 itself).
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
constexpr int64_t kTileWords = kWords * kGroup;  // words of one tap of the weights

VGG_TARGET inline __attribute__((always_inline)) void load_x(const char* pixels) {
  _tile_loadd(4, pixels, kLine);
  _tile_loadd(5, pixels + kTile * kLine, kLine);
}

VGG_TARGET inline __attribute__((always_inline)) void load_weight(const uint32_t* weight) {
  _tile_loadd(6, weight, kGroup * 4);
  _tile_loadd(7, weight + kTile, kGroup * 4);
}

VGG_TARGET inline __attribute__((always_inline)) void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// 32 pixels x 32 channels of raw accumulators, [pixel][kGroup]. Loads come in pairs, then four products: interleaving
// them was measured to be slower (docs/performance.md). kUsed of the kParts parts are multiplied.
template <int kParts, int kUsed, int kTapsPerBlock>
VGG_TARGET inline void accumulate_tiles(const Conv3x3Args& a, const char* x, const uint32_t* weight, float* out) {
  const int64_t row = (a.w + 2) * kLine, plane = (a.h + 2) * row;
  constexpr int64_t kPart = kTapsPerBlock * kTileWords;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t b = 0; b < a.cin_blocks; ++b, x += kParts * plane, weight += kParts * kPart) {
#pragma GCC unroll 9
    for (int tap = 0; tap < kTapsPerBlock; ++tap) {
      const char* pixels = x + (tap / 3) * row + (tap % 3) * kLine;
      const uint32_t* w = weight + tap * kTileWords;
      load_x(pixels);
      if constexpr (kUsed == 1) {
        load_weight(w);
        multiply();
      } else if constexpr (kUsed == 2) {
        load_weight(w + kPart);
        multiply();
        load_weight(w);
        multiply();
        load_x(pixels + plane);
        multiply();
      } else {
        load_weight(w + 2 * kPart);
        multiply();
        load_weight(w);
        multiply();
        load_weight(w + kPart);
        multiply();
        load_x(pixels + plane);
        multiply();
        load_weight(w);
        multiply();
        load_x(pixels + 2 * plane);
        multiply();
      }
    }
  }
  _tile_stored(0, out, kGroup * 4);
  _tile_stored(1, out + kTile, kGroup * 4);
  _tile_stored(2, out + kTile * kGroup, kGroup * 4);
  _tile_stored(3, out + kTile * kGroup + kTile, kGroup * 4);
}

// An infinite x times the small parts of a weight may have either sign, and zero parts make NaN: where a sum is not
// finite, the product of the first parts alone, which hold all that is not finite, tells what it is.
template <int kParts, int kTapsPerBlock>
VGG_TARGET inline void repair_not_finite(const Conv3x3Args& a, const char* x, const uint32_t* weight, float* out) {
  constexpr int64_t kFloats = 2 * kTile * kGroup;
  const __m512 zero = _mm512_setzero_ps();
  __mmask16 wrong = 0;
  for (int64_t i = 0; i < kFloats; i += 16) {
    const __m512 v = _mm512_load_ps(out + i);
    wrong |= _mm512_cmp_ps_mask(_mm512_sub_ps(v, v), zero, _CMP_NEQ_UQ);
  }
  if (__builtin_expect(wrong == 0, 1)) return;
  alignas(64) float first[kFloats];
  accumulate_tiles<kParts, 1, kTapsPerBlock>(a, x, weight, first);
  for (int64_t i = 0; i < kFloats; i += 16) {
    const __m512 v = _mm512_load_ps(out + i);
    const __mmask16 replace = _mm512_cmp_ps_mask(_mm512_sub_ps(v, v), zero, _CMP_NEQ_UQ);
    _mm512_mask_store_ps(out + i, replace, _mm512_load_ps(first + i));
  }
}

template <int kParts, int kTapsPerBlock>
VGG_TARGET inline void accumulate_line(const Conv3x3Args& a, const char* x, const uint32_t* weight, int64_t pixels,
                                       float* out) {
  for (int64_t p = 0; p < pixels; p += 2 * kTile) {
    accumulate_tiles<kParts, kParts, kTapsPerBlock>(a, x + p * kLine, weight, out + p * kGroup);
    if constexpr (kParts > 1) repair_not_finite<kParts, kTapsPerBlock>(a, x + p * kLine, weight, out + p * kGroup);
  }
}

template <int kParts>
VGG_TARGET inline void conv3x3_tiles(const Conv3x3Args& a, int64_t group, int64_t row_begin, int64_t row_end,
                                     float* scratch) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t pitch = a.w + 2;
  const uint32_t* weight = a.weight + group * a.cin_blocks * kParts * a.taps * kTileWords;
  const char* x = a.x + row_begin * pitch * kLine;
  const int64_t pixels = (row_end - row_begin - 1) * pitch + a.w;
  if (a.taps == kTaps) {
    accumulate_line<kParts, kTaps>(a, x, weight, pixels, scratch);
  } else {
    accumulate_line<kParts, 1>(a, x, weight, pixels, scratch);
  }
  _tile_release();
  const int64_t step = pitch * kGroup;
  if (a.pool) {
    for (int64_t row = row_begin; row + 1 < row_end; row += 2, scratch += 2 * step) {
      epilogue_row<Avx512, true, kParts>(a, group, row / 2, scratch, scratch + step);
    }
  } else {
    for (int64_t row = row_begin; row < row_end; ++row, scratch += step) {
      epilogue_row<Avx512, false, kParts>(a, group, row, scratch, nullptr);
    }
  }
}

}  // namespace

VGG_TARGET void split_parts_avx512(const float* from, int64_t vectors, char* to, int64_t stride, int64_t parts) {
  for (int64_t i = 0; i < vectors; ++i, from += 16, to += 32) {
    const __m512 v = _mm512_loadu_ps(from);
    if (parts == 2) {
      Avx512::store_parts<2>(to, stride, v);
    } else {
      Avx512::store_parts<3>(to, stride, v);
    }
  }
}

VGG_TARGET void conv3x3_amx_bf16(const Conv3x3Args& args, int64_t group, int64_t row_begin, int64_t row_end,
                                 float* scratch) {
  conv3x3_tiles<1>(args, group, row_begin, row_end, scratch);
}

VGG_TARGET void conv3x3_amx_bf16x3(const Conv3x3Args& args, int64_t group, int64_t row_begin, int64_t row_end,
                                   float* scratch) {
  conv3x3_tiles<2>(args, group, row_begin, row_end, scratch);
}

VGG_TARGET void conv3x3_amx_bf16x6(const Conv3x3Args& args, int64_t group, int64_t row_begin, int64_t row_end,
                                   float* scratch) {
  conv3x3_tiles<3>(args, group, row_begin, row_end, scratch);
}

}  // namespace vgg_fast
#endif
