// bf16 on AMX, and fp32 as sums of bf16 values. A block is the same columns of two neighbouring rows by 32 channels; 16
// neighbouring pixels of a channel block are 1 KB in one piece, and every tap is a constant offset.
//
//   tiles  0-3  accumulators  [2 rows x columns] x [2 x 16 channels], fp32
//          4,5  x             [columns][16 words]
//          6,7  weights       [16 words][16 channels], two bf16 each (VNNI)
//
// A row is cut into tiles of equal, even width (28 pixels: 14 + 14), so that none of a VGG's widths has columns to
// drop; the time of a tile product follows its number of rows.
//
// With x = x1 + x2 + x3 and w = w1 + w2 + w3, two parts give x1 w1 + x1 w2 + x2 w1 (what is left out is 2^-18 of a
// product), three parts add x1 w3 + x2 w2 + x3 w1 (2^-26: below the rounding of fp32 itself).
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "../conv3x3.h"
#include "amx.h"

#define VGG_TARGET __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq")))

namespace vgg_fast {
namespace {

#include "conv3x3_rows.inl"
#include "isa_avx512.inl"

// These CPUs convert to bf16 in one instruction, with the same bits for all that FlushDenormals leaves.
struct Amx : Avx512 {
  VGG_TARGET static void store_bf16(char* p, Vec v) {
    const __m256bh packed = _mm512_cvtneps_pbh(v);
    __builtin_memcpy(p, &packed, sizeof packed);
  }
};

constexpr int64_t kTile = 16;  // pixels or channels of a tile
constexpr int64_t kGroup = Avx512::kGroup;
constexpr int64_t kTileWords = kWords * kGroup;  // words of one tap of the weights

VGG_TARGET inline __attribute__((always_inline)) void load_x(const char* pixels, int64_t below) {
  _tile_loadd(4, pixels, kLine);
  _tile_loadd(5, pixels + below, kLine);
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

// Where a block is: its inputs `x` and, `below` bytes further, those of its second row (0: there is none, and the first
// one is computed twice).
struct Block {
  const char* x;
  int64_t below;
  int64_t row, column, width;
  float* sums;  // [2][kTile][kGroup]
};

// Lines to be fetched into L2, some with every tap.
struct Prefetch {
  const char* line;
  int64_t per_tap;

  VGG_TARGET void fetch() {
    for (int64_t i = 0; i < per_tap; ++i, line += kLine) _mm_prefetch(line, _MM_HINT_T1);
  }
};

// Raw accumulators of a block. Loads come in pairs, then four products: interleaving them was measured to be slower
// (docs/performance.md). kUsed of the kParts parts are multiplied. `meanwhile` is called while many products are under
// way: what it does costs next to nothing.
template <int kParts, int kUsed, int kTapsPerBlock, class Meanwhile>
VGG_TARGET inline void accumulate_tiles(const Conv3x3Args& a, const Block& block, const uint32_t* weight, float* out,
                                        const Meanwhile& meanwhile, Prefetch next) {
  const int64_t row = (a.w + 2) * kLine, plane = a.x_plane, below = block.below;
  constexpr int64_t kPart = kTapsPerBlock * kTileWords;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const char* x = block.x;
  for (int64_t b = 0; b < a.cin_blocks; ++b, x += kParts * plane, weight += kParts * kPart) {
#pragma GCC unroll 9
    for (int tap = 0; tap < kTapsPerBlock; ++tap) {
      const char* pixels = x + (tap / 3) * row + (tap % 3) * kLine;
      const uint32_t* w = weight + tap * kTileWords;
      load_x(pixels, below);
      next.fetch();
      if constexpr (kUsed == 1) {
        load_weight(w);
        multiply();
      } else if constexpr (kUsed == 2) {
        load_weight(w + kPart);
        multiply();
        load_weight(w);
        multiply();
        load_x(pixels + plane, below);
        multiply();
      } else {
        load_weight(w + 2 * kPart);
        multiply();
        load_weight(w);
        multiply();
        load_weight(w + kPart);
        multiply();
        load_x(pixels + plane, below);
        multiply();
        load_weight(w);
        multiply();
        load_x(pixels + 2 * plane, below);
        multiply();
      }
    }
    if (b == 0) meanwhile();
  }
  _tile_stored(0, out, kGroup * 4);
  _tile_stored(1, out + kTile, kGroup * 4);
  _tile_stored(2, out + kTile * kGroup, kGroup * 4);
  _tile_stored(3, out + kTile * kGroup + kTile, kGroup * 4);
}

constexpr int64_t kSums = 2 * kTile * kGroup;

// An infinite x times the small parts of a weight may have either sign, and zero parts make NaN: where a sum is not
// finite, the product of the first parts alone, which hold all that is not finite, tells what it is.
template <int kParts, int kTapsPerBlock>
VGG_TARGET inline void repair_not_finite(const Conv3x3Args& a, const Block& block, const uint32_t* weight) {
  const __m512 zero = _mm512_setzero_ps();
  __mmask16 wrong = 0;
  for (int64_t row = 0; row < 2; ++row) {
    for (int64_t i = 0; i < block.width * kGroup; i += 16) {
      const __m512 v = _mm512_load_ps(block.sums + row * kTile * kGroup + i);
      wrong |= _mm512_cmp_ps_mask(_mm512_sub_ps(v, v), zero, _CMP_NEQ_UQ);
    }
  }
  if (__builtin_expect(wrong == 0, 1)) return;
  alignas(64) float under_way[4][kTile * kTile], first[kSums];
  _tile_stored(0, under_way[0], kTile * 4);
  _tile_stored(1, under_way[1], kTile * 4);
  _tile_stored(2, under_way[2], kTile * 4);
  _tile_stored(3, under_way[3], kTile * 4);
  accumulate_tiles<kParts, 1, kTapsPerBlock>(a, block, weight, first, [] {}, {});
  _tile_loadd(0, under_way[0], kTile * 4);
  _tile_loadd(1, under_way[1], kTile * 4);
  _tile_loadd(2, under_way[2], kTile * 4);
  _tile_loadd(3, under_way[3], kTile * 4);
  for (int64_t i = 0; i < kSums; i += 16) {
    const __m512 v = _mm512_load_ps(block.sums + i);
    const __mmask16 replace = _mm512_cmp_ps_mask(_mm512_sub_ps(v, v), zero, _CMP_NEQ_UQ);
    _mm512_mask_store_ps(block.sums + i, replace, _mm512_load_ps(first + i));
  }
}

// The epilogue of a block runs in the middle of the next one's products.
template <int kParts, int kTapsPerBlock>
VGG_TARGET inline void conv3x3_tiles(const Conv3x3Args& a, int64_t group, int64_t row_begin, int64_t row_end,
                                     float* scratch) {
  const int64_t pitch = (a.w + 2) * kLine;
  const int64_t tiles = ceil_div(a.w, kTile), columns = 2 * ceil_div(a.w, 2 * tiles);
  TileConfig config;
  std::fill_n(config.rows, 6, uint8_t(columns));
  _tile_loadconfig(&config);
  const uint32_t* weight = a.weight + group * a.cin_blocks * kParts * kTapsPerBlock * kTileWords;
  Block before{};
  const auto finish = [&]() VGG_TARGET {
    if (before.width == 0) return;
    if constexpr (kParts > 1) repair_not_finite<kParts, kTapsPerBlock>(a, before, weight);
    epilogue<Amx, kParts>(a, group, before.row, before.column, before.width, before.below != 0, before.sums,
                          kTile * kGroup);
  };
  float* sums = scratch;
  const int64_t taps = a.cin_blocks * kTapsPerBlock, blocks = ceil_div(row_end - row_begin, 2) * tiles;
  Prefetch next{a.next, ceil_div(a.next_lines, blocks * taps)};
  for (int64_t row = row_begin; row < row_end; row += 2) {
    for (int64_t column = 0; column < a.w; column += columns) {
      const Block block{a.x + row * pitch + column * kLine,
                        row + 1 < row_end ? pitch : 0,
                        row,
                        column,
                        std::min(columns, a.w - column),
                        sums};
      accumulate_tiles<kParts, kParts, kTapsPerBlock>(a, block, weight, sums, finish, next);
      next.line += next.per_tap * taps * kLine;
      before = block;
      sums = sums == scratch ? scratch + kSums : scratch;
    }
  }
  finish();
  _tile_release();
}

template <int kParts>
VGG_TARGET inline void conv3x3_parts(const Conv3x3Args& a, int64_t group, int64_t row_begin, int64_t row_end,
                                     float* scratch) {
  if (a.taps == kTaps) return conv3x3_tiles<kParts, kTaps>(a, group, row_begin, row_end, scratch);
  conv3x3_tiles<kParts, 1>(a, group, row_begin, row_end, scratch);
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
  conv3x3_parts<1>(args, group, row_begin, row_end, scratch);
}

VGG_TARGET void conv3x3_amx_bf16x3(const Conv3x3Args& args, int64_t group, int64_t row_begin, int64_t row_end,
                                   float* scratch) {
  conv3x3_parts<2>(args, group, row_begin, row_end, scratch);
}

VGG_TARGET void conv3x3_amx_bf16x6(const Conv3x3Args& args, int64_t group, int64_t row_begin, int64_t row_end,
                                   float* scratch) {
  conv3x3_parts<3>(args, group, row_begin, row_end, scratch);
}

}  // namespace vgg_fast
#endif
