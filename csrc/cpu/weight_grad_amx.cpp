// The weight gradient in bf16 on AMX: pixels are the inner dimension. x is transposed, so that a tile is 16 channels by
// 32 neighbouring pixels and a tap a constant offset; dy comes in pairs of neighbouring pixels (VNNI).
//
//   tiles  0-3  sums  [2 x 16 channels of x] x [2 x 16 channels of dy], fp32
//          4,5  x     [16 channels][16 pairs of pixels]
//          6,7  dy    [16 pairs of pixels][16 channels]
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "amx.h"
#include "weight_grad.h"

#define VGG_TARGET __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq")))

namespace vgg_fast {
namespace {

constexpr int64_t kStep = 32;  // pixels of a tile
constexpr int64_t kSide = 32;  // channels of either side
constexpr int64_t kHalf = 16;

// Words (first[c], second[c]) of 16 channels, of which `mask` exist.
VGG_TARGET inline __m512i pairs(const uint16_t* first, const uint16_t* second, __mmask16 mask) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first));
  if (second == nullptr) return low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Rows and columns of 16x16 words change places.
VGG_TARGET inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

VGG_TARGET inline __mmask16 channels_from(int64_t channel, int64_t count) {
  const int64_t there = count - channel;
  return there >= kHalf ? 0xffff : there <= 0 ? 0 : __mmask16((1u << there) - 1);
}

}  // namespace

VGG_TARGET void weight_grad_pack_x_amx(const WeightGradArgs& a, const WeightGradAmx& p, int64_t image, int64_t row,
                                       char* x) {
  const uint16_t* map = reinterpret_cast<const uint16_t*>(a.x) + (image * a.h + row) * a.w * a.cin;
  const int64_t end = (p.h + 1) * p.pitch + 1;
  for (int64_t channel = 0; channel < ceil_div(a.cin, kSide) * kSide; channel += kHalf, x += kHalf * p.x_row_bytes) {
    const __mmask16 mask = channels_from(channel, a.cin);
    const uint16_t* pixels = map + channel;
    char* to = x + ((row + 1) * p.pitch + 1) * 2;
    for (int64_t column = 0; column < p.w; column += kStep, pixels += kStep * a.cin, to += kStep * 2) {
      const int64_t count = std::min(kStep, p.w - column);
      __m512i words[kHalf];
      for (int64_t i = 0; i < kHalf; ++i) {
        const uint16_t* first = pixels + 2 * i * a.cin;
        words[i] =
            2 * i >= count ? _mm512_setzero_si512() : pairs(first, 2 * i + 1 < count ? first + a.cin : nullptr, mask);
      }
      transpose(words);
      const __mmask32 there = count >= kStep ? 0xffffffffu : __mmask32((1u << count) - 1);
      for (int64_t c = 0; c < kHalf; ++c) _mm512_mask_storeu_epi16(to + c * p.x_row_bytes, there, words[c]);
    }
    for (int64_t c = 0; c < kHalf; ++c) {  // the border between this row and the next
      uint16_t* line = reinterpret_cast<uint16_t*>(x + c * p.x_row_bytes);
      for (int64_t i = p.w + 1; i <= p.pitch; ++i) line[(row + 1) * p.pitch + i] = 0;
      if (row == 0) std::memset(line, 0, (p.pitch + 1) * 2);
      if (row + 1 == p.h) std::memset(line + end, 0, p.x_row_bytes - end * 2);
    }
  }
}

VGG_TARGET void weight_grad_pack_dy_amx(const WeightGradArgs& a, const WeightGradAmx& p, int64_t image, int64_t row,
                                        char* dy) {
  const uint16_t* map = reinterpret_cast<const uint16_t*>(a.dy) + (image * a.h + row) * a.w * a.cout;
  for (int64_t channel = 0; channel < ceil_div(a.cout, kSide) * kSide; channel += kHalf, dy += p.dy_block) {
    const __mmask16 mask = channels_from(channel, a.cout);
    char* to = dy + row * p.pitch / 2 * kLine;
    for (int64_t column = 0; column < p.pitch; column += 2, to += kLine) {
      const uint16_t* first = map + column * a.cout + channel;
      __m512i words = _mm512_setzero_si512();
      if (column < p.w) words = pairs(first, column + 1 < p.w ? first + a.cout : nullptr, mask);
      _mm512_storeu_si512(to, words);
    }
    if (row + 1 == p.h) std::memset(to, 0, p.dy_block - (to - dy));
  }
}

VGG_TARGET void weight_grad_amx(const WeightGradAmx& p, const char* x, const char* dy, int64_t begin, int64_t end,
                                float* sums) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t x_half = kHalf * p.x_row_bytes, row = kTaps * kSide * 4;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t image = chunk / p.chunks(), first = chunk % p.chunks() * p.kChunk;
    const int64_t steps = std::min(p.kChunk, p.pixels - first) / kStep;
    const char* pixels = x + image * p.x_image + first * 2;
    const char* gradient = dy + image * p.dy_image + first * 32;
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      float* out = sums + tap * kSide;
      if (chunk == begin) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      } else {
        _tile_loadd(0, out, row);
        _tile_loadd(1, out + kHalf, row);
        _tile_loadd(2, out + kHalf * kTaps * kSide, row);
        _tile_loadd(3, out + kHalf * kTaps * kSide + kHalf, row);
      }
      const char* a = pixels + (tap / 3 * p.pitch + tap % 3) * 2;
      const char* b = gradient;
      for (int64_t step = 0; step < steps; ++step, a += kLine, b += kHalf * kLine) {
        _tile_loadd(4, a, p.x_row_bytes);
        _tile_loadd(6, b, kLine);
        _tile_loadd(7, b + p.dy_block, kLine);
        _tile_loadd(5, a + x_half, p.x_row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, out, row);
      _tile_stored(1, out + kHalf, row);
      _tile_stored(2, out + kHalf * kTaps * kSide, row);
      _tile_stored(3, out + kHalf * kTaps * kSide + kHalf, row);
    }
  }
  _tile_release();
}

}  // namespace vgg_fast
#endif
