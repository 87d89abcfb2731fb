// conv3x3 for sm_90a: wgmma straight from a halo tile that TMA copies, with warp specialisation.
//
//              +- parallel: CTA -----------------+- parallel: CTA -+- sequential --------------------------+
//   one tile:  | 4 blocks of 8 x 8 pixels        | 128 of cout     | cin in chunks of 64, 9 taps, 4 k-steps |
//              +- consumer, m64 -+- mma, 8 x 8 --+- mma, n128 -----+------------------------------- mma, k16 +
//
// A CTA takes tile after tile. One thread of the producer warpgroup copies: for each chunk the 10 x 10 pixel halos of
// the four blocks, for each tap of it the weights, each into a ring of its own. Two consumer warpgroups multiply, two
// blocks each. What lies outside the image TMA fills with zeros: that is the padding, and no size is special.
//
// In shared memory a halo is
//   [chunk / 8][halo row 10][halo column 10][8 channels]     16-byte cells: (channels * 100 + row * 10 + column) * 16
// so the rows of a core matrix (8 neighbouring pixels x 8 channels) lie side by side, image rows are 160 bytes and
// channels 1600 bytes apart: a wgmma operand without swizzling for ANY start, and a tap is the start moved by
// (kh * 10 + kw) * 16 bytes. Each pixel is copied once (1.56 times with the halos), not nine times. The price are rows
// of 16 bytes for TMA. 128-byte rows under a swizzle would halve the sectors read, but then starts would not be
// multiples of the swizzle's 1024 bytes, and what wgmma does with these is not documented.
//
// The weights' rows are copied in another order (a fifth dimension of the tensor map costs nothing) so that a thread's
// accumulators are 8 neighbouring channels: 16-byte stores, no shuffles, no shared memory in the epilogue.
//   column 32 a + 8 b + 2 t + e of a product is channel 32 a + 8 t + 2 b + e:  b < 4, t = lane % 4, e < 2
#pragma once

#include <cuda_runtime.h>

#include "numeric.cuh"
#include "ptx_sm90.cuh"

namespace vgg_fast::cuda::sm90 {

constexpr int kBlock = 8, kHalo = kBlock + 2;  // pixels, on each side
constexpr int kBlocks = 4, kConsumers = 2, kThreads = 128 * (kConsumers + 1);
constexpr int kChunk = 64, kColumns = 128;                 // channels in and out
constexpr int kCell = 16, kPlane = kHalo * kHalo * kCell;  // bytes: 8 channels of a pixel, of a halo
constexpr int kHaloBytes = kChunk / 8 * kPlane;
constexpr int kPixelBytes = kBlocks * kHaloBytes, kWeightBytes = kColumns * kChunk * 2;
constexpr int kPixelStages = 2, kWeightStages = 7;  // a stage of pixels serves nine of weights
constexpr int kWeightsAt = kPixelStages * kPixelBytes, kBarriersAt = kWeightsAt + kWeightStages * kWeightBytes;
constexpr int kSharedBytes = kBarriersAt + 2 * (kPixelStages + kWeightStages) * 8;
static_assert(kSharedBytes == 217232, "all of it dynamic: no cubin tells, so the tests read it here");
static_assert(kSharedBytes <= 227 * 1024 && kWeightsAt % 1024 == 0);

// 64 accumulators for each of two blocks; 40 * 128 + 232 * 256 = 168 * 384, what the launch bounds leave to a thread.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// A problem as the kernel takes it; shapes of the tensors as in Conv3x3Args.
struct Problem {
  const float* affine;
  void* out;
  void* tap;  // with pool: also the map before it, or null
  int n, h, w, cin, cout;
  int down, across;  // blocks of an image
  int tiles;
  float floor;  // of the result: 0 for ReLU, else -infinity
};

struct Block {
  int n, y, x;  // the image, and the first pixel
};

// Tiles that share their pixels are neighbours. The blocks past the last are of an image past the last: all zeros.
__device__ inline Block block_of(const Problem& p, int tile, int i) {
  const int block = tile / (p.cout / kColumns) * kBlocks + i, line = block / p.across;
  return {line / p.down, line % p.down * kBlock, block % p.across * kBlock};
}

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
struct Shared {
  uint32_t start;
  __device__ uint32_t pixels(int stage) const { return start + stage * kPixelBytes; }
  __device__ uint32_t weights(int stage) const { return start + kWeightsAt + stage * kWeightBytes; }
  __device__ uint32_t pixels_full(int stage) const { return start + kBarriersAt + stage * 8; }
  __device__ uint32_t pixels_empty(int stage) const { return pixels_full(kPixelStages + stage); }
  __device__ uint32_t weights_full(int stage) const { return pixels_full(2 * kPixelStages + stage); }
  __device__ uint32_t weights_empty(int stage) const { return weights_full(kWeightStages + stage); }
};

__device__ inline void produce(const CUtensorMap& x, const CUtensorMap& weight, const Problem& p, Shared shared) {
  Ring<kPixelStages> pixels;
  Ring<kWeightStages> weights;
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    const int column = tile % (p.cout / kColumns) * kColumns;
    Block blocks[kBlocks];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) blocks[i] = block_of(p, tile, i);
    for (int channel = 0; channel < p.cin; channel += kChunk) {
      ptx::mbarrier_wait(shared.pixels_empty(pixels.stage), pixels.parity ^ 1);
      const uint32_t full = shared.pixels_full(pixels.stage);
      ptx::mbarrier_arrive_expect(full, kPixelBytes);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i)
        ptx::copy_box(shared.pixels(pixels.stage) + i * kHaloBytes, x, full, 0, blocks[i].x - 1, blocks[i].y - 1,
                      channel / 8, blocks[i].n);
      pixels.advance();
#pragma unroll 1
      for (int tap = 0; tap < 9; ++tap) {
        ptx::mbarrier_wait(shared.weights_empty(weights.stage), weights.parity ^ 1);
        const uint32_t arrived = shared.weights_full(weights.stage);
        ptx::mbarrier_arrive_expect(arrived, kWeightBytes);
        ptx::copy_box(shared.weights(weights.stage), weight, arrived, tap * p.cin + channel, 0, 0, 0, column / 32);
        weights.advance();
      }
    }
  }
}

// What a thread needs for its 8 neighbouring channels from `co` on.
struct Affine {
  float scale[8], shift[8];

  __device__ Affine(const Problem& p, int co) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      *reinterpret_cast<float4*>(scale + i) = __ldg(reinterpret_cast<const float4*>(p.affine + co + i));
      *reinterpret_cast<float4*>(shift + i) = __ldg(reinterpret_cast<const float4*>(p.affine + p.cout + co + i));
    }
  }

  // scale * sum + shift, or `floor` where that is less (not where it is NaN), in 16 bytes.
  template <typename T>
  __device__ uint4 apply(const float (&sum)[8], float floor) const {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    uint4 cell;
    Pair* pairs = reinterpret_cast<Pair*>(&cell);
    float y[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      y[i] = fmaf(sum[i], scale[i], shift[i]);
      y[i] = y[i] < floor ? floor : y[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, __half>)
        pairs[i] = __floats2half2_rn(y[2 * i], y[2 * i + 1]);
      else
        pairs[i] = __floats2bfloat162_rn(y[2 * i], y[2 * i + 1]);
    }
    return cell;
  }
};

// Element 8 * (lane % 4) of the pixel, of the tile's first channel; null outside the map.
template <typename T>
__device__ T* cell_of(const Problem& p, void* map, int n, int y, int x, int h, int w, int column, int lane) {
  if (n >= p.n || y >= h || x >= w) return nullptr;
  return static_cast<T*>(map) + ((static_cast<int64_t>(n) * h + y) * w + x) * p.cout + column + 8 * (lane % 4);
}

// Both blocks of a warpgroup. Of each a warp has two rows, a thread the same column of both.
template <typename T>
__device__ void store_pixels(const Problem& p, void* map, const Block (&blocks)[2], int column, int warp, int lane,
                             const float (&sums)[2][64]) {
  T* cells[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int s = 0; s < 2; ++s)
      cells[i][s] =
          cell_of<T>(p, map, blocks[i].n, blocks[i].y + 2 * warp + s, blocks[i].x + lane / 4, p.h, p.w, column, lane);
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    const Affine affine(p, column + 32 * a + 8 * (lane % 4));
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        float sum[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[c] = sums[i][16 * a + 4 * (c / 2) + 2 * s + c % 2];
        if (cells[i][s]) *reinterpret_cast<uint4*>(cells[i][s] + 32 * a) = affine.apply<T>(sum, p.floor);
      }
  }
}

// The same, pooled: a window is both rows of two threads, four lanes apart. The one on the left goes on with the lower
// half of the channels, the one on the right with the upper half.
template <typename T>
__device__ void store_windows(const Problem& p, const Block (&blocks)[2], int column, int warp, int lane,
                              const float (&sums)[2][64]) {
  const bool right = lane & 4;
  const int half = right ? 64 : 0;
  T* cells[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    cells[i] = cell_of<T>(p, p.out, blocks[i].n, blocks[i].y / 2 + warp, blocks[i].x / 2 + lane / 8, p.h / 2, p.w / 2,
                          column + half, lane);
#pragma unroll
  for (int a = 0; a < 2; ++a) {
    const Affine affine(p, column + half + 32 * a + 8 * (lane % 4));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float best[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int lower = 16 * a + 4 * (c / 2) + c % 2, upper = lower + 32;
        const float left_half = pool_max(sums[i][lower], sums[i][lower + 2]);
        const float right_half = pool_max(sums[i][upper], sums[i][upper + 2]);
        const float other = __shfl_xor_sync(0xFFFFFFFF, right ? left_half : right_half, 4);
        best[c] = pool_max(right ? right_half : left_half, other);
      }
      if (cells[i]) *reinterpret_cast<uint4*>(cells[i] + 32 * a) = affine.apply<T>(best, p.floor);
    }
  }
}

template <typename T, bool kPool>
__device__ void consume(const Problem& p, Shared shared, int consumer) {
  constexpr uint64_t kPixelMatrix = ptx::matrix_descriptor(kPlane, kHalo * kCell, false);
  constexpr uint64_t kWeightMatrix = ptx::matrix_descriptor(16, 1024, true);
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  Ring<kPixelStages> pixels;
  Ring<kWeightStages> weights;
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    float sums[2][64];
    uint32_t read_weights = 0, read_pixels = 0;  // the mbarriers of the stages that the products under way read
    for (int channel = 0; channel < p.cin; channel += kChunk) {
      ptx::mbarrier_wait(shared.pixels_full(pixels.stage), pixels.parity);
      const uint64_t halos = ptx::at(kPixelMatrix, shared.pixels(pixels.stage) + 2 * consumer * kHaloBytes);
#pragma unroll 1
      for (int tap = 0; tap < 9; ++tap) {
        ptx::mbarrier_wait(shared.weights_full(weights.stage), weights.parity);
        const uint64_t pixel = halos + (tap / 3 * kHalo + tap % 3);
        const uint64_t weight = ptx::at(kWeightMatrix, shared.weights(weights.stage));
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            ptx::wgmma_m64n128k16<T>(sums[i], pixel + (i * kHaloBytes + 2 * k * kPlane) / 16, weight + 2 * k,
                                     k > 0 || channel + tap > 0);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        // The tap before is done. Each warp speaks for itself.
        if (lane == 0 && channel + tap > 0) {
          ptx::mbarrier_arrive(read_weights);
          if (tap == 0) ptx::mbarrier_arrive(read_pixels);
        }
        read_weights = shared.weights_empty(weights.stage);
        weights.advance();
      }
      read_pixels = shared.pixels_empty(pixels.stage);
      pixels.advance();
    }
    ptx::wgmma_wait<0>();
    if (lane == 0) {
      ptx::mbarrier_arrive(read_weights);
      ptx::mbarrier_arrive(read_pixels);
    }
    const int column = tile % (p.cout / kColumns) * kColumns;
    const Block blocks[2] = {block_of(p, tile, 2 * consumer), block_of(p, tile, 2 * consumer + 1)};
    if constexpr (kPool) {
      store_windows<T>(p, blocks, column, warp, lane, sums);
      if (p.tap) store_pixels<T>(p, p.tap, blocks, column, warp, lane, sums);
    } else {
      store_pixels<T>(p, p.out, blocks, column, warp, lane, sums);
    }
  }
}

template <typename T, bool kPool>
__global__ void __launch_bounds__(kThreads, 1)
    conv3x3_sm90_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
                        const Problem p) {
  extern __shared__ __align__(1024)
      uint8_t memory[];  // nothing else is in shared memory: it starts where the CTA's does
  const Shared shared{ptx::shared_address(memory)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPixelStages; ++i) {
      ptx::mbarrier_init(shared.pixels_full(i), 1);
      ptx::mbarrier_init(shared.pixels_empty(i), 4 * kConsumers);
    }
    for (int i = 0; i < kWeightStages; ++i) {
      ptx::mbarrier_init(shared.weights_full(i), 1);
      ptx::mbarrier_init(shared.weights_empty(i), 4 * kConsumers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  // The number of the warpgroup, from one lane: the compiler then knows that it is the same in a warp.
  const int group = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
  if (group == kConsumers) {
    ptx::give_registers<kProducerRegisters>();
    if (threadIdx.x == 128 * kConsumers) {
      ptx::prefetch(x);
      ptx::prefetch(weight);
      produce(x, weight, p, shared);
    }
  } else {
    ptx::take_registers<kConsumerRegisters>();
    consume<T, kPool>(p, shared, group);
  }
}

}  // namespace vgg_fast::cuda::sm90
