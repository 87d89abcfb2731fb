// conv3x3 for sm_90a: wgmma straight from a halo tile that TMA copies, with warp specialisation.
//
//              +- parallel: CTA ------------------+- parallel: CTA -+- sequential ----------------+
//   one tile:  | 4 (or 2) blocks of kRows x 8     | 64 of cout      | cin in chunks of 128 bytes, |
//              |                     pixels       |                 | 9 taps, 4 k-steps           |
//              +- consumer -- mma, n = 8 * kRows -+- mma, m64 ------+-------------- mma, 32 bytes +
//
// A CTA takes item after item of the plan (conv3x3_sm90_cuda.h). One thread of the producer warpgroup copies: for each
// chunk the halos of the blocks, (kRows + 2) x 10 pixels, for each tap of it the weights, each into a ring of its own.
// Two consumer warpgroups multiply, two blocks (or one) each, all of them with the same weights. What lies outside the
// image TMA fills with zeros: that is the padding, and no size is special.
//
// The product is transposed: output channels are its rows, pixels its columns, of which there may be any multiple of 8.
// So blocks are 14 rows high where that fits a map better than 16 (the plan chooses), and a tile is many pixels by few
// channels: with a halo, a pixel costs the L2 little more for 64 channels than for 128, and weights are what is left.
//
// In shared memory a halo is
//   [halo row kRows + 2][halo column 10][channels of a chunk]     of a pixel 128 bytes, their 16-byte units swizzled
// so 8 neighbouring pixels are the 8 rows of a core matrix, the next row of the block lies 10 pixels further, and a tap
// is the start moved by kh * 10 + kw pixels. Each pixel is copied once (1.4 times, with the halos) and not nine times.
// The start of an operand is then not that of its swizzle's pattern, of 1024 bytes. PTX ISA 9.7.15.5.1.2.2 asks of the
// descriptor's base offset that it tell where the *pattern* starts: at a multiple of 1024 bytes, so it is 0; the bits
// of an address alone decide how it is swizzled, as they do when TMA writes. No example shows it. Where a GPU
// disagrees, the self test finds out.
//
// fp32 is multiplied as tf32: wgmma reads the upper 19 bits of what TMA has copied, so operands are cut off, not
// rounded.
#pragma once

#include <cuda_runtime.h>

#include "conv3x3_sm90_traits.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "ptx_sm90.cuh"

namespace vgg_fast::cuda::sm90 {

// How many taps the first consumer is ahead of the second. Either keeps the tensor cores busy alone, so the one's
// epilogue is hidden behind the other's products, for as long as the lead lasts: 448 or 512 clocks a tap, an epilogue
// is some 1000 (estimated from its instructions). Whoever is ahead loses the lead in his epilogue, and has it back in
// the other's.
constexpr int kLead = 3;
constexpr int kGatherBarrier = 1, kLeadBarrier = 2;

template <typename T, int kRows>
__device__ void produce(const CUtensorMap& x, const CUtensorMap& weight, const Task& t, Shared<kRows> shared) {
  using L = Layout<kRows>;
  Rings<kRows> rings;
  auto& [pixels, weights] = rings;
  for (int i = blockIdx.x; i < t.items; i += gridDim.x) {
    const Item item(t, i, kChunk<T>);
    const int count = item.whole ? kSm90Whole : kSm90Half;
    for (int channel = item.begin; channel < item.end; channel += kChunk<T>) {
      ptx90::mbarrier_wait(shared.pixels_empty(pixels.stage), pixels.parity ^ 1);
      ptx90::mbarrier_arrive_expect(shared.pixels_full(pixels.stage), count * L::kCopied);
#pragma unroll 1
      for (int b = 0; b < count; ++b) {
        const Block<kRows> block(t, item.block + b);
        ptx90::copy_box(shared.pixels(pixels.stage) + b * L::kHaloBytes, x, shared.pixels_full(pixels.stage), channel,
                        block.x - 1, block.y - 1, block.n);
      }
      pixels.advance();
#pragma unroll 1
      for (int tap = 0; tap < 9; ++tap) {
        ptx90::mbarrier_wait(shared.weights_empty(weights.stage), weights.parity ^ 1);
        ptx90::mbarrier_arrive_expect(shared.weights_full(weights.stage), kWeightBytes);
        ptx90::copy_box(shared.weights(weights.stage), weight, shared.weights_full(weights.stage),
                        tap * t.cin + channel, 0, 0, 0, item.column / 16);
        weights.advance();
      }
    }
  }
}

// A thread's accumulators of a block: sums[4 * y + 2 * s + e] is of pixel (y, 2 * (lane % 4) + e), and of row 8 * s +
// lane / 4 of the warp's 16 rows of weights. So a warp has matrices of 8 rows by 8 pixels, a channel a row, and for
// full sectors 8 neighbouring channels of a pixel must be stored at once.
// fp32: they are 32 bytes, in eight lanes; row 8 * s + r is channel 8 * s + r. 16 bits: movmatrix turns a matrix
// around, and a thread has two channels of one pixel. Row 8 * s + 2 * r + e is channel 4 * r + 2 * s + e, so the two of
// the other s are their neighbours: 8 bytes a thread, 32 in four lanes. (encode_weights has it so.)
template <typename T>
constexpr bool kTurned = sizeof(T) == 2;

struct Affine {
  float scale[2], shift[2], floor;

  // Of the channels of a thread's rows, s = 0 and 1.
  template <typename T>
  static __device__ Affine of(const Task& t, int column, int warp, int lane) {
    Affine a;
    a.floor = t.floor;
    const float* scale = t.affine + column + 16 * warp;
    const float* shift = scale + t.cout;
    if constexpr (kTurned<T>) {  // four values, of which two are wanted: full sectors
      const bool odd = lane / 4 % 2;
      const float4 scales = __ldg(reinterpret_cast<const float4*>(scale + lane / 8 * 4));
      const float4 shifts = __ldg(reinterpret_cast<const float4*>(shift + lane / 8 * 4));
      a.scale[0] = odd ? scales.y : scales.x;
      a.scale[1] = odd ? scales.w : scales.z;
      a.shift[0] = odd ? shifts.y : shifts.x;
      a.shift[1] = odd ? shifts.w : shifts.z;
    } else {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        a.scale[s] = __ldg(scale + 8 * s + lane / 4);
        a.shift[s] = __ldg(shift + 8 * s + lane / 4);
      }
    }
    return a;
  }

  // scale * sum + shift, or `floor` where that is less (not where it is NaN).
  __device__ float apply(float sum, int s) const {
    const float y = fmaf(sum, scale[s], shift[s]);
    return y < floor ? floor : y;
  }

  // The same of two columns of a matrix, rounded.
  template <typename T>
  __device__ uint32_t pair(const float (&sums)[2], int s) const {
    const float left = apply(sums[0], s), right = apply(sums[1], s);
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Pair both;
    if constexpr (std::is_same_v<T, __half>)
      both = __floats2half2_rn(left, right);
    else
      both = __floats2bfloat162_rn(left, right);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
};

// Stores the matrices of both s. sums: of columns 2 * (lane % 4) and that + 1; place(column): how many pixels behind
// `at` it lies, or -1 if outside; at: the warp's first channel there.
template <typename T, typename Place>
__device__ void store_columns(T* at, int cout, int lane, const Affine& affine, const float (&sums)[2][2], Place place) {
  if constexpr (kTurned<T>) {
    const uint2 channels =
        make_uint2(ptx90::transpose8x8(affine.pair<T>(sums[0], 0)), ptx90::transpose8x8(affine.pair<T>(sums[1], 1)));
    const int pixel = place(lane / 4);
    // Of an assignment the compiler makes two stores, of half sectors.
    if (pixel >= 0)
      __stwb(reinterpret_cast<uint2*>(at + static_cast<int64_t>(pixel) * cout + 4 * (lane % 4)), channels);
  } else {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int pixel = place(2 * (lane % 4) + e);
#pragma unroll
      for (int s = 0; s < 2; ++s)
        if (pixel >= 0) at[static_cast<int64_t>(pixel) * cout + 8 * s + lane / 4] = affine.apply(sums[s][e], s);
    }
  }
}

template <typename T, int kRows>
__device__ void store_pixels(const Task& t, const Block<kRows>& block, T* map, int lane, const Affine& affine,
                             const float (&sums)[4 * kRows]) {
  const int down = block.n < t.n ? t.h - block.y : 0, across = t.w - block.x;
  T* at = map + ((static_cast<int64_t>(block.n) * t.h + block.y) * t.w + block.x) * t.cout;
#pragma unroll
  for (int y = 0; y < kRows; ++y, at += static_cast<int64_t>(t.w) * t.cout) {
    const float* row = sums + 4 * y;
    const float columns[2][2] = {{row[0], row[1]}, {row[2], row[3]}};
    store_columns(at, t.cout, lane, affine, columns, [&](int x) { return y < down && x < across ? x : -1; });
  }
}

// The same, pooled: a window is four sums of one thread. Columns 2 * x and 2 * x + 1 of a matrix are the windows x of
// two rows of them.
template <typename T, int kRows>
__device__ void store_windows(const Task& t, const Block<kRows>& block, T* map, int lane, const Affine& affine,
                              const float (&sums)[4 * kRows]) {
  const int h = t.h / 2, w = t.w / 2, top = block.y / 2, left = block.x / 2;
  const int down = block.n < t.n ? min(h - top, kRows / 2) : 0, across = w - left;
  T* at = map + ((static_cast<int64_t>(block.n) * h + top) * w + left) * t.cout;
#pragma unroll
  for (int y = 0; y < kRows / 2; y += 2, at += static_cast<int64_t>(2 * w) * t.cout) {
    float best[2][2] = {};
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (y + e < kRows / 2) {
          const float* window = sums + 8 * (y + e) + 2 * s;
          best[s][e] = pool_max(pool_max(window[0], window[1]), pool_max(window[4], window[5]));
        }
    store_columns(at, t.cout, lane, affine, best, [&](int column) {
      const int odd = column % 2, x = column / 2;
      return y + odd < down && x < across ? odd * w + x : -1;
    });
  }
}

template <typename T, int kRows, int kOwn>
__device__ void multiply(const Task& t, const Item& item, Shared<kRows> shared, int consumer, int lane,
                         Rings<kRows>& rings, int& lead, float (&sums)[kOwn][4 * kRows]) {
  constexpr int kHaloBytes = Layout<kRows>::kHaloBytes;
  constexpr uint64_t kWeightMatrix = ptx90::matrix_descriptor(16, 8 * kPixel, true);
  constexpr uint64_t kPixelMatrix = ptx90::matrix_descriptor(16, kHalo * kPixel, true);
  auto& [pixels, weights] = rings;
  uint32_t read_weights = 0, read_pixels = 0;  // the mbarriers of the stages that the products under way read
  for (int channel = item.begin; channel < item.end; channel += kChunk<T>) {
    ptx90::mbarrier_wait(shared.pixels_full(pixels.stage), pixels.parity);
    const uint64_t halos = ptx90::at(kPixelMatrix, shared.pixels(pixels.stage) + kOwn * consumer * kHaloBytes);
#pragma unroll 1
    for (int tap = 0; tap < 9; ++tap) {
      const bool first = channel == item.begin && tap == 0;
      ptx90::mbarrier_wait(shared.weights_full(weights.stage), weights.parity);
      const uint64_t pixel = halos + (tap / 3 * kHalo + tap % 3) * (kPixel / 16);
      const uint64_t weight = ptx90::at(kWeightMatrix, shared.weights(weights.stage));
      ptx90::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kPixel / 32; ++k)
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
          ptx90::wgmma<T>(sums[i], weight + 2 * k, pixel + i * kHaloBytes / 16 + 2 * k, k > 0 || !first);
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
template <int kRows>
__device__ bool gather(const Task& t, const Item& item, Shared<kRows> shared, float (&sums)[4 * kRows]) {
  constexpr int kEach = 128 * kConsumers;
  const int thread = threadIdx.x;
  float4* parts = reinterpret_cast<float4*>(t.partial) + int64_t{item.tile} * t.split * kRows * kEach + thread;
#pragma unroll
  for (int q = 0; q < kRows; ++q)
    parts[(item.part * kRows + q) * kEach] =
        make_float4(sums[4 * q], sums[4 * q + 1], sums[4 * q + 2], sums[4 * q + 3]);
  __threadfence();
  ptx90::barrier_sync(kGatherBarrier, kEach);
  if (thread == 0)  // the counter is back at zero after the last one
    ptx90::store_shared(shared.flag(), atomicInc(t.arrived + item.tile, t.split - 1) == t.split - 1);
  ptx90::barrier_sync(kGatherBarrier, kEach);
  if (!ptx90::load_shared(shared.flag())) return false;
  __threadfence();
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  // Its own part, too: kept in registers beside the sums it would spill.
#pragma unroll 1
  for (int part = 0; part < t.split; ++part)
#pragma unroll
    for (int q = 0; q < kRows; ++q) {
      const float4 four = parts[(part * kRows + q) * kEach];
      sums[4 * q] += four.x;
      sums[4 * q + 1] += four.y;
      sums[4 * q + 2] += four.z;
      sums[4 * q + 3] += four.w;
    }
  return true;
}

template <typename T, int kRows, int kOwn>
__device__ void consume(const Task& t, const Item& item, Shared<kRows> shared, int consumer, Rings<kRows>& rings,
                        int& lead) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  float sums[kOwn][4 * kRows];
  multiply<T>(t, item, shared, consumer, lane, rings, lead, sums);
  if constexpr (kOwn == 1)
    if (t.split > 1 && !gather(t, item, shared, sums[0])) return;
  const Affine affine = Affine::of<T>(t, item.column, warp, lane);
  T* out = static_cast<T*>(t.out) + item.column + 16 * warp;
  T* pooled = static_cast<T*>(t.pooled) + item.column + 16 * warp;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const Block<kRows> block(t, item.block + kOwn * consumer + i);
    if (t.out) store_pixels(t, block, out, lane, affine, sums[i]);
    if (t.pooled) store_windows(t, block, pooled, lane, affine, sums[i]);
  }
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    conv3x3_sm90_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
                        const Task t) {
  using L = Layout<kRows>;
  extern __shared__ __align__(1024) uint8_t memory[];  // all there is: it starts where the shared memory does
  const Shared<kRows> shared{ptx::shared_address(memory)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < L::kPixelStages; ++i) {
      ptx90::mbarrier_init(shared.pixels_full(i), 1);
      ptx90::mbarrier_init(shared.pixels_empty(i), 4 * kConsumers);
    }
    for (int i = 0; i < L::kWeightStages; ++i) {
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
      produce<T>(x, weight, t, shared);
    }
    return;
  }
  ptx90::take_registers<kConsumerRegisters>();
  int lead = group == 0 ? kLead : 0;
  if (group != 0) ptx90::barrier_sync(kLeadBarrier, 128 * kConsumers);
  Rings<kRows> rings;
  for (int i = blockIdx.x; i < t.items; i += gridDim.x) {
    const Item item(t, i, kChunk<T>);
    if (item.whole)
      consume<T, kRows, 2>(t, item, shared, group, rings, lead);
    else
      consume<T, kRows, 1>(t, item, shared, group, rings, lead);
  }
}

}  // namespace vgg_fast::cuda::sm90
