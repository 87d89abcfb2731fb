// Hopper's conv3x3: a problem, a work item and a block of it as the kernel takes them, and where all lies in shared
// memory. See conv3x3_sm90.cuh.
#pragma once

#include <cuda_runtime.h>

#include "conv3x3_sm90_cuda.h"

namespace vgg_fast::cuda::sm90 {

constexpr int kWidth = kSm90Width, kHalo = kWidth + 2, kColumns = kSm90Columns;
constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);
constexpr int kPixel = kSm90Chunk, kPattern = 8 * kPixel;  // bytes: a pixel's chunk, what repeats under the swizzle
constexpr int kWeightBytes = kColumns * kPixel;
constexpr int kMostShared = 227 * 1024;

// Shared memory for blocks of so many rows: halos, weights, mbarriers, a flag.
template <int kRows>
struct Layout {
  static constexpr int kCopied = (kRows + 2) * kHalo * kPixel;  // bytes of a halo
  static constexpr int kHaloBytes = (kCopied + kPattern - 1) / kPattern * kPattern;
  static constexpr int kPixelStages = 2, kPixelBytes = kSm90Whole * kHaloBytes;
  static constexpr int kWeightStages = (kMostShared - kPixelStages * kPixelBytes - 1024) / kWeightBytes;
  static constexpr int kWeightsAt = kPixelStages * kPixelBytes, kBarriersAt = kWeightsAt + kWeightStages * kWeightBytes;
  static constexpr int kFlagAt = kBarriersAt + 2 * (kPixelStages + kWeightStages) * 8, kBytes = kFlagAt + 16;
};
static_assert(Layout<14>::kWeightStages == 8 && Layout<16>::kWeightStages == 5);
// All of it is dynamic and no cubin tells, so the tests read it here.
static_assert(Layout<14>::kBytes == 229552 && Layout<16>::kBytes == 229504);

// 64 accumulators for each of two blocks; 24 * 128 + 240 * 256 = 168 * 384, what the launch bounds leave to a thread.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

template <typename T>
constexpr int kChunk = kPixel / sizeof(T);  // channels

// A problem and its plan as the kernel takes them; shapes of the tensors as in Sm90Args.
struct Task {
  const float* affine;
  void *out, *pooled;
  float* partial;
  unsigned* arrived;
  int n, h, w, cin, cout;
  int down, across, whole, items, split;
  float floor;  // of the result: 0 for ReLU, else -infinity
};

// One work item. Tiles that share their pixels are neighbours.
struct Item {
  bool whole;
  int block, column;  // the first of each
  int begin, end;     // channels
  int tile, part;     // of those whose sum is shared

  __device__ Item(const Task& t, int item, int chunk) : whole(item < t.whole) {
    const int columns = t.cout / kColumns, rest = item - t.whole;
    tile = rest / t.split;
    part = rest % t.split;
    const int at = whole ? item : tile, row = at / columns;
    block = whole ? row * kSm90Whole : t.whole / columns * kSm90Whole + row * kSm90Half;
    column = at % columns * kColumns;
    const int chunks = t.cin / chunk, each = whole ? chunks : (chunks + t.split - 1) / t.split;
    begin = whole ? 0 : part * each * chunk;
    end = min(begin + each * chunk, t.cin);
  }
};

template <int kRows>
struct Block {
  int n, y, x;  // the image, and the first pixel

  // The blocks past the last are of an image past the last: all zeros.
  __device__ Block(const Task& t, int block) {
    const int line = block / t.across;
    n = line / t.down;
    y = line % t.down * kRows;
    x = block % t.across * kWidth;
  }
};

// A place in a ring of kStages, and the parity of the phase that fills it.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Addresses in shared memory.
template <int kRows>
struct Shared {
  using L = Layout<kRows>;
  uint32_t start;

  __device__ uint32_t pixels(int stage) const { return start + stage * L::kPixelBytes; }
  __device__ uint32_t weights(int stage) const { return start + L::kWeightsAt + stage * kWeightBytes; }
  __device__ uint32_t pixels_full(int stage) const { return start + L::kBarriersAt + stage * 8; }
  __device__ uint32_t pixels_empty(int stage) const { return pixels_full(L::kPixelStages + stage); }
  __device__ uint32_t weights_full(int stage) const { return pixels_full(2 * L::kPixelStages + stage); }
  __device__ uint32_t weights_empty(int stage) const { return weights_full(L::kWeightStages + stage); }
  __device__ uint32_t flag() const { return start + L::kFlagAt; }
};

template <int kRows>
struct Rings {
  Ring<Layout<kRows>::kPixelStages> pixels;
  Ring<Layout<kRows>::kWeightStages> weights;
};

}  // namespace vgg_fast::cuda::sm90
