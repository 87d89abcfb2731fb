// The tiles of conv3x3_mma as constants of its kernels, and its positions taken apart. See conv3x3_mma_cuda.h.
#pragma once

#include <cuda_runtime.h>

#include "conv3x3_mma_cuda.h"

namespace vgg_fast::cuda {

template <typename T_, int kTileIndex>
struct MmaTraits {
  using T = T_;
  static constexpr MmaTile kTile = kMmaTiles[kTileIndex];
  static constexpr int kUnits = kTile.units, kColumns = kTile.columns, kBn = kTile.bn, kWarpsN = kTile.warps_n();
  static constexpr int kThreads = 32 * kTile.warps();
  static constexpr int kPositions = kTile.bm / 2;           // of a tile, two pixels each
  static constexpr int kUnit = 16 / sizeof(T);              // channels in 16 bytes
  static constexpr int kPlane = kBn + 4;                    // rows; 4 more, so that two planes lie in different banks
  static constexpr int kWeightStage = 3 * 2 * kPlane * 16;  // bytes: kh, half, output channel
  static constexpr int kVectors = kColumns / (kUnit / 2);   // 16-byte stores of a thread for one pixel
};

// A position (see conv3x3_mma_cuda.h) taken apart.
struct Place {
  int strip;   // counted over all images
  int pair;    // of rows, counted over all strips
  int column;  // of the strip
};

__device__ inline Place place_of(const MmaArgs& a, int position) {
  const int pair = position / a.strip;
  return {pair / a.pairs, pair, position - pair * a.strip};
}

}  // namespace vgg_fast::cuda
