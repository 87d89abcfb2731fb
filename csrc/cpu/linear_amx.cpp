// Fully connected layers in bf16 on AMX. The weights are the left factor, so that PyTorch's own rows are loaded as they
// lie: 16 rows x 32 inputs. The inputs are laid out anew as pairs (VNNI), 16 images (or as many as there are) wide.
//
//   tiles  0-3  sums     [2 x 16 rows] x [2 x 16 images], fp32
//          4,5  weights  [16 rows][32 inputs]
//          6,7  inputs   [16 pairs of inputs][16 images]
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "../linear.h"
#include "amx.h"
#include "convert.h"

#define VGG_TARGET __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq")))

namespace vgg_fast {
namespace {

#include "linear_rows.inl"

constexpr int64_t kTile = 16, kPairs = 16, kInputs = 2 * kPairs;
// Inputs that sums stay in tiles for, where images are many: weights and inputs of a step are then still in L2.
constexpr int64_t kStretch = 1024;

// Bytes of a row to fetch ahead where weights are read once: the processor's own prefetching ends at every 4 KB page.
// Measured: 512 takes 15 % off the time of one image, 2048 less.
constexpr int64_t kAheadOfTile = 512;

// The intrinsics do not tell the compiler what memory they read or write.
inline void memory_is_seen() { asm volatile("" ::: "memory"); }

// A unit may end within its first or its second tile of rows. Without a second one, the first is taken twice.
inline TileConfig tiles_of(int64_t unit_rows, int64_t columns) {
  TileConfig config;
  const int64_t first = std::min(unit_rows, kTile), second = unit_rows > kTile ? unit_rows - kTile : first;
  for (int tile : {0, 1, 4}) config.rows[tile] = uint8_t(first);
  for (int tile : {2, 3, 5}) config.rows[tile] = uint8_t(second);
  for (int tile : {0, 1, 2, 3, 6, 7}) config.bytes_per_row[tile] = uint16_t(columns * 4);
  return config;
}

// sums[2 row tiles][kBlocks][16][columns] of up to 32 rows and kBlocks blocks of images, continued over `steps` x 32
// inputs. second: bytes from the first tile of rows to the second.
// kOnce: the weights are not read again.
template <int kBlocks, bool kOnce>
VGG_TARGET inline void multiply(const char* weights, int64_t row, int64_t second, const char* x, int64_t x_block,
                                int64_t columns, int64_t steps, float* sums) {
  const int64_t pitch = columns * 4, tile = kTile * columns;
  _tile_loadd(0, sums, pitch);
  _tile_loadd(2, sums + kBlocks * tile, pitch);
  if constexpr (kBlocks == 2) {
    _tile_loadd(1, sums + tile, pitch);
    _tile_loadd(3, sums + 3 * tile, pitch);
  }
  for (int64_t step = 0; step < steps; ++step, weights += kLine, x += kPairs * pitch) {
    if constexpr (kOnce) {
      // An address, not a pointer: it may lie behind the weights, where a prefetch does nothing.
      const uintptr_t ahead = reinterpret_cast<uintptr_t>(weights) + kAheadOfTile;
      for (int64_t r = 0; r < 2 * kTile; ++r) __builtin_prefetch(reinterpret_cast<const void*>(ahead + r * row));
    }
    _tile_loadd(6, x, pitch);
    if constexpr (kBlocks == 2) _tile_loadd(7, x + x_block, pitch);
    _tile_loadd(4, weights, row);
    _tile_loadd(5, weights + second, row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kBlocks == 2) _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kBlocks == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, pitch);
  _tile_stored(2, sums + kBlocks * tile, pitch);
  if constexpr (kBlocks == 2) {
    _tile_stored(1, sums + tile, pitch);
    _tile_stored(3, sums + 3 * tile, pitch);
  }
}

// Up to 32 rows: all inputs in [k, k_end), all images.
VGG_TARGET void multiply_rows(const LinearArgs& a, int64_t begin, int64_t rows, int64_t k, int64_t k_end, float* sums) {
  const TileConfig config = tiles_of(rows, a.columns);
  memory_is_seen();
  _tile_loadconfig(&config);
  const char* weights = a.weight + begin * a.weight_row;
  const int64_t x_step = kPairs * a.columns * 4, x_block = ceil_div(a.in, kInputs) * x_step;
  const int64_t second = rows > kTile ? kTile : 0, rest = k_end % kInputs;
  // Rows end where they end: the inputs behind the last whole step go through a buffer.
  char tail[2 * kTile][kLine] = {};
  for (int64_t r = 0; rest > 0 && r < rows; ++r) {
    std::memcpy(tail[r], weights + r * a.weight_row + (k_end - rest) * 2, rest * 2);
  }
  memory_is_seen();
  const int64_t blocks = ceil_div(a.images, a.columns), steps = (k_end - k) / kInputs;
  for (int64_t block = 0; block < blocks; block += 2, sums += 4 * kTile * a.columns) {
    const char* x = a.x + block * x_block + k / kInputs * x_step;
    if (blocks == 1) {
      multiply<1, true>(weights + k * 2, a.weight_row, second * a.weight_row, x, x_block, a.columns, steps, sums);
    } else if (blocks == 2) {
      multiply<2, true>(weights + k * 2, a.weight_row, second * a.weight_row, x, x_block, a.columns, steps, sums);
    } else if (block + 1 < blocks) {
      multiply<2, false>(weights + k * 2, a.weight_row, second * a.weight_row, x, x_block, a.columns, steps, sums);
    } else {
      multiply<1, false>(weights + k * 2, a.weight_row, second * a.weight_row, x, x_block, a.columns, steps, sums);
    }
    if (rest == 0) continue;
    if (block + 1 < blocks) {
      multiply<2, false>(tail[0], kLine, second * kLine, x + steps * x_step, x_block, a.columns, 1, sums);
    } else {
      multiply<1, false>(tail[0], kLine, second * kLine, x + steps * x_step, x_block, a.columns, 1, sums);
    }
  }
  memory_is_seen();
}

}  // namespace

VGG_TARGET void linear_amx_bf16(const LinearArgs& a, int64_t begin, int64_t end, char* scratch) {
  float* sums = reinterpret_cast<float*>(scratch);
  const int64_t blocks = ceil_div(a.images, a.columns), tile = kTile * a.columns;
  const int64_t of_32_rows = ceil_div(blocks, 2) * 4 * tile;
  std::memset(sums, 0, ceil_div(end - begin, 2 * kTile) * of_32_rows * sizeof(float));
  const int64_t stretch = end - begin > 2 * kTile ? kStretch : a.in;
  for (int64_t k = 0; k < a.in; k += stretch) {
    float* part = sums;
    for (int64_t row = begin; row < end; row += 2 * kTile, part += of_32_rows) {
      multiply_rows(a, row, std::min(2 * kTile, end - row), k, std::min(k + stretch, a.in), part);
    }
  }
  _tile_release();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t r = row - begin, in_32 = r % (2 * kTile);
    for (int64_t i = 0; i < a.images; ++i) {
      const int64_t block = i / a.columns, wide = block + 1 < blocks || block % 2 == 1 ? 2 : 1;
      const float* pair = sums + r / (2 * kTile) * of_32_rows + block / 2 * 4 * tile;
      const int64_t at = in_32 / kTile * wide * tile + block % 2 * tile + in_32 % kTile * a.columns + i % a.columns;
      store_output(a, row, i, pair[at]);
    }
  }
}

}  // namespace vgg_fast
#endif
