// conv3x3 for sm_90a: wgmma straight from a halo tile that TMA copies, with warp specialisation.
//
//              +- parallel: CTA -----------------+- parallel: CTA -+- sequential --------------------------+
//   one tile:  | 4 (or 2) blocks of 8 x 8 pixels | 128 of cout     | cin in chunks of 64, 9 taps, 4 k-steps |
//              +- consumer, m64 -+- mma, 8 x 8 --+- mma, n128 -----+------------------------------- mma, k16 +
//
// A CTA takes item after item of the plan (conv3x3_sm90_cuda.h). One thread of the producer warpgroup copies: for each
// chunk the 10 x 10 pixel halos of the blocks, for each tap of it the weights, each into a ring of its own. Two
// consumer warpgroups multiply, two blocks (or one) each. What lies outside the image TMA fills with zeros: that is the
// padding, and no size is special.
//
// In shared memory a halo is
//   [chunk / 8][halo row 10][halo column 10][8 channels]     16-byte cells: (channels * 100 + row * 10 + column) * 16
// so the rows of a core matrix (8 neighbouring pixels x 8 channels) lie side by side: a wgmma operand without
// swizzling, for ANY start, and a tap is the start moved by kh * 10 + kw cells. So each pixel is copied once (1.56
// times, with the halos) and not nine times. The price are rows of 16 bytes for TMA, each of them half a sector.
// 128-byte rows under a swizzle would not have it, but then a tap's start would not be a multiple of the swizzle's 1024
// bytes, and what wgmma does there is not documented.
//
// A tap's weights are 128 rows of 64 channels under the 128-byte swizzle. TMA copies their rows in another order (the
// dimensions of a tensor map may be any), so that a thread's accumulators are of 8 neighbouring output channels:
// 16-byte stores, no shuffles, no shared memory in the epilogue.
//   row 32 a + 8 b + 2 t + e holds channel 32 a + 8 t + 2 b + e:  b < 4, t = lane % 4, e < 2
#pragma once

#include <cuda_runtime.h>

#include "conv3x3_sm90_cuda.h"
#include "numeric.cuh"
#include "ptx.cuh"
#include "ptx_sm90.cuh"

namespace vgg_fast::cuda::sm90 {

constexpr int kBlock = kSm90Block, kHalo = kBlock + 2, kColumns = kSm90Columns, kChunk = kSm90Channels;
constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);
constexpr int kCell = 16, kPlane = kHalo * kHalo * kCell;  // bytes: 8 channels of a pixel, of a halo
constexpr int kHaloBytes = kChunk / 8 * kPlane, kPixelBytes = kSm90Whole * kHaloBytes;
constexpr int kWeightBytes = kColumns * kChunk * 2;
constexpr int kPixelStages = 2, kWeightStages = 7;  // a stage of pixels serves nine of weights
constexpr int kWeightsAt = kPixelStages * kPixelBytes, kBarriersAt = kWeightsAt + kWeightStages * kWeightBytes;
constexpr int kFlagAt = kBarriersAt + 2 * (kPixelStages + kWeightStages) * 8, kSharedBytes = kFlagAt + 16;
static_assert(kSharedBytes == 217248, "all of it dynamic: no cubin tells, so the tests read it here");
static_assert(kSharedBytes <= 227 * 1024 && kWeightsAt % 1024 == 0);

// 64 accumulators for each of two blocks; 24 * 128 + 240 * 256 = 168 * 384, what the launch bounds leave to a thread.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

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

  __device__ Item(const Task& t, int item) : whole(item < t.whole) {
    const int columns = t.cout / kColumns, rest = item - t.whole;
    tile = rest / t.split;
    part = rest % t.split;
    const int at = whole ? item : tile, row = at / columns;
    block = whole ? row * kSm90Whole : t.whole / columns * kSm90Whole + row * kSm90Half;
    column = at % columns * kColumns;
    const int chunks = t.cin / kChunk, each = whole ? chunks : (chunks + t.split - 1) / t.split;
    begin = whole ? 0 : part * each * kChunk;
    end = min(begin + each * kChunk, t.cin);
  }
};

struct Block {
  int n, y, x;  // the image, and the first pixel

  // The blocks past the last are of an image past the last: all zeros.
  __device__ Block(const Task& t, int block) {
    const int line = block / t.across;
    n = line / t.down;
    y = line % t.down * kBlock;
    x = block % t.across * kBlock;
  }
};

// How many taps the first consumer is ahead of the second. Either keeps the tensor cores busy alone, so the one's
// epilogue is hidden behind the other's products, for as long as the lead lasts: 512 clocks a tap, an epilogue is 1000
// to 1500 (estimated from its instructions). Whoever is ahead loses the lead in his epilogue, and has it back in the
// other's.
constexpr int kLead = 3;
constexpr int kGatherBarrier = 1, kLeadBarrier = 2;

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

__device__ inline void produce(const CUtensorMap& x, const CUtensorMap& weight, const Task& t, Shared shared) {
  Ring<kPixelStages> pixels;
  Ring<kWeightStages> weights;
  for (int i = blockIdx.x; i < t.items; i += gridDim.x) {
    const Item item(t, i);
    const int count = item.whole ? kSm90Whole : kSm90Half;
    for (int channel = item.begin; channel < item.end; channel += kChunk) {
      ptx90::mbarrier_wait(shared.pixels_empty(pixels.stage), pixels.parity ^ 1);
      ptx90::mbarrier_arrive_expect(shared.pixels_full(pixels.stage), count * kHaloBytes);
#pragma unroll 1
      for (int b = 0; b < count; ++b) {
        const Block block(t, item.block + b);
        ptx90::copy_box(shared.pixels(pixels.stage) + b * kHaloBytes, x, shared.pixels_full(pixels.stage), 0,
                        block.x - 1, block.y - 1, channel / 8, block.n);
      }
      pixels.advance();
#pragma unroll 1
      for (int tap = 0; tap < 9; ++tap) {
        ptx90::mbarrier_wait(shared.weights_empty(weights.stage), weights.parity ^ 1);
        ptx90::mbarrier_arrive_expect(shared.weights_full(weights.stage), kWeightBytes);
        ptx90::copy_box(shared.weights(weights.stage), weight, shared.weights_full(weights.stage),
                        tap * t.cin + channel, 0, 0, 0, item.column / 32);
        weights.advance();
      }
    }
  }
}

// What a thread needs for its 8 neighbouring channels from `co` on.
struct Affine {
  float scale[8], shift[8];

  __device__ Affine(const Task& t, int co) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      *reinterpret_cast<float4*>(scale + i) = __ldg(reinterpret_cast<const float4*>(t.affine + co + i));
      *reinterpret_cast<float4*>(shift + i) = __ldg(reinterpret_cast<const float4*>(t.affine + t.cout + co + i));
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
__device__ T* cell_of(const Task& t, void* map, int n, int y, int x, int h, int w, int column, int lane) {
  if (n >= t.n || y >= h || x >= w) return nullptr;
  return static_cast<T*>(map) + ((static_cast<int64_t>(n) * h + y) * w + x) * t.cout + column + 8 * (lane % 4);
}

// The blocks of a warpgroup. Of each a warp has two rows, a thread the same column of both.
template <typename T, int kOwn>
__device__ void store_pixels(const Task& t, const Block (&blocks)[kOwn], int column, int warp, int lane,
                             const float (&sums)[kOwn][64]) {
  T* cells[kOwn][2];
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int s = 0; s < 2; ++s)
      cells[i][s] =
          cell_of<T>(t, t.out, blocks[i].n, blocks[i].y + 2 * warp + s, blocks[i].x + lane / 4, t.h, t.w, column, lane);
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    const Affine affine(t, column + 32 * a + 8 * (lane % 4));
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        float sum[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[c] = sums[i][16 * a + 4 * (c / 2) + 2 * s + c % 2];
        if (cells[i][s]) *reinterpret_cast<uint4*>(cells[i][s] + 32 * a) = affine.apply<T>(sum, t.floor);
      }
  }
}

// The same, pooled: a window is both rows of two threads, four lanes apart. The one on the left goes on with the lower
// half of the channels, the one on the right with the upper half.
template <typename T, int kOwn>
__device__ void store_windows(const Task& t, const Block (&blocks)[kOwn], int column, int warp, int lane,
                              const float (&sums)[kOwn][64]) {
  const bool right = lane & 4;
  const int half = right ? 64 : 0;
  T* cells[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    cells[i] = cell_of<T>(t, t.pooled, blocks[i].n, blocks[i].y / 2 + warp, blocks[i].x / 2 + lane / 8, t.h / 2,
                          t.w / 2, column + half, lane);
#pragma unroll
  for (int a = 0; a < 2; ++a) {
    const Affine affine(t, column + half + 32 * a + 8 * (lane % 4));
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float best[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int lower = 16 * a + 4 * (c / 2) + c % 2, upper = lower + 32;
        const float left_half = pool_max(sums[i][lower], sums[i][lower + 2]);
        const float right_half = pool_max(sums[i][upper], sums[i][upper + 2]);
        const float other = __shfl_xor_sync(0xFFFFFFFF, right ? left_half : right_half, 4);
        best[c] = pool_max(right ? right_half : left_half, other);
      }
      if (cells[i]) *reinterpret_cast<uint4*>(cells[i] + 32 * a) = affine.apply<T>(best, t.floor);
    }
  }
}

template <typename T, int kOwn>
__device__ void multiply(const Task& t, const Item& item, Shared shared, int consumer, int lane,
                         Ring<kPixelStages>& pixels, Ring<kWeightStages>& weights, int& lead, float (&sums)[kOwn][64]) {
  constexpr uint64_t kPixelMatrix = ptx90::matrix_descriptor(kPlane, kHalo * kCell, false);
  constexpr uint64_t kWeightMatrix = ptx90::matrix_descriptor(16, 8 * kChunk * 2, true);
  uint32_t read_weights = 0, read_pixels = 0;  // the mbarriers of the stages that the products under way read
  for (int channel = item.begin; channel < item.end; channel += kChunk) {
    ptx90::mbarrier_wait(shared.pixels_full(pixels.stage), pixels.parity);
    const uint64_t halos = ptx90::at(kPixelMatrix, shared.pixels(pixels.stage) + kOwn * consumer * kHaloBytes);
#pragma unroll 1
    for (int tap = 0; tap < 9; ++tap) {
      const bool first = channel == item.begin && tap == 0;
      ptx90::mbarrier_wait(shared.weights_full(weights.stage), weights.parity);
      const uint64_t pixel = halos + (tap / 3 * kHalo + tap % 3);
      const uint64_t weight = ptx90::at(kWeightMatrix, shared.weights(weights.stage));
      ptx90::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kChunk / 16; ++k)
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
          ptx90::wgmma_m64n128k16<T>(sums[i], pixel + (i * kHaloBytes + 2 * k * kPlane) / 16, weight + 2 * k,
                                     k > 0 || !first);
      ptx90::wgmma_commit();
      if (lead > 0 && --lead == 0) ptx90::barrier_arrive(kLeadBarrier, 128 * kConsumers);
      ptx90::wgmma_wait<1>();
      // The tap before is done. Each warp speaks for itself.
      if (lane == 0 && !first) {
        ptx90::mbarrier_arrive(read_weights);
        if (tap == 0) ptx90::mbarrier_arrive(read_pixels);
      }
      read_weights = shared.weights_empty(weights.stage);
      weights.advance();
    }
    read_pixels = shared.pixels_empty(pixels.stage);
    pixels.advance();
  }
  ptx90::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kOwn; ++i) ptx90::wgmma_settle(sums[i]);
  if (lane == 0) {
    ptx90::mbarrier_arrive(read_weights);
    ptx90::mbarrier_arrive(read_pixels);
  }
}

// Adds up the sums of all items that share a tile, in their order; true for the item that came last and has them all.
__device__ inline bool gather(const Task& t, const Item& item, Shared shared, float (&sums)[64]) {
  constexpr int kEach = 128 * kConsumers;
  const int thread = threadIdx.x;
  float4* parts = reinterpret_cast<float4*>(t.partial) + int64_t{item.tile} * t.split * 16 * kEach + thread;
#pragma unroll
  for (int q = 0; q < 16; ++q)
    parts[(item.part * 16 + q) * kEach] = make_float4(sums[4 * q], sums[4 * q + 1], sums[4 * q + 2], sums[4 * q + 3]);
  __threadfence();
  ptx90::barrier_sync(kGatherBarrier, kEach);
  if (thread == 0)  // the counter is back at zero after the last one
    ptx90::store_shared(shared.start + kFlagAt, atomicInc(t.arrived + item.tile, t.split - 1) == t.split - 1);
  ptx90::barrier_sync(kGatherBarrier, kEach);
  if (!ptx90::load_shared(shared.start + kFlagAt)) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < 64; ++i) sums[i] = 0.0f;
#pragma unroll 1
  for (int part = 0; part < t.split; ++part)
#pragma unroll
    for (int q = 0; q < 16; ++q) {
      const float4 four = parts[(part * 16 + q) * kEach];
      sums[4 * q] += four.x;
      sums[4 * q + 1] += four.y;
      sums[4 * q + 2] += four.z;
      sums[4 * q + 3] += four.w;
    }
  return true;
}

template <typename T, int kOwn>
__device__ void consume(const Task& t, const Item& item, Shared shared, int consumer, Ring<kPixelStages>& pixels,
                        Ring<kWeightStages>& weights, int& lead) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  float sums[kOwn][64];
  multiply<T>(t, item, shared, consumer, lane, pixels, weights, lead, sums);
  if constexpr (kOwn == 1)
    if (t.split > 1 && !gather(t, item, shared, sums[0])) return;
  const int block = item.block + kOwn * consumer;
  if constexpr (kOwn == 1) {
    const Block blocks[1] = {Block(t, block)};
    if (t.out) store_pixels<T>(t, blocks, item.column, warp, lane, sums);
    if (t.pooled) store_windows<T>(t, blocks, item.column, warp, lane, sums);
  } else {
    const Block blocks[2] = {Block(t, block), Block(t, block + 1)};
    if (t.out) store_pixels<T>(t, blocks, item.column, warp, lane, sums);
    if (t.pooled) store_windows<T>(t, blocks, item.column, warp, lane, sums);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    conv3x3_sm90_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
                        const Task t) {
  extern __shared__ __align__(1024) uint8_t memory[];  // all there is: it starts where the shared memory does
  const Shared shared{ptx::shared_address(memory)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPixelStages; ++i) {
      ptx90::mbarrier_init(shared.pixels_full(i), 1);
      ptx90::mbarrier_init(shared.pixels_empty(i), 4 * kConsumers);
    }
    for (int i = 0; i < kWeightStages; ++i) {
      ptx90::mbarrier_init(shared.weights_full(i), 1);
      ptx90::mbarrier_init(shared.weights_empty(i), 4 * kConsumers);
    }
    ptx90::fence_mbarrier_init();
  }
  __syncthreads();

  // The number of the warpgroup, from one lane: the compiler then knows that it is the same in a warp.
  const int group = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
  if (group == kConsumers) {
    ptx90::give_registers<kProducerRegisters>();
    if (threadIdx.x == 128 * kConsumers) {
      ptx90::prefetch(x);
      ptx90::prefetch(weight);
      produce(x, weight, t, shared);
    }
    return;
  }
  ptx90::take_registers<kConsumerRegisters>();
  int lead = group == 0 ? kLead : 0;
  if (group != 0) ptx90::barrier_sync(kLeadBarrier, 128 * kConsumers);
  Ring<kPixelStages> pixels;
  Ring<kWeightStages> weights;
  for (int i = blockIdx.x; i < t.items; i += gridDim.x) {
    const Item item(t, i);
    if (item.whole)
      consume<T, 2>(t, item, shared, group, pixels, weights, lead);
    else
      consume<T, 1>(t, item, shared, group, pixels, weights, lead);
  }
}

}  // namespace vgg_fast::cuda::sm90
