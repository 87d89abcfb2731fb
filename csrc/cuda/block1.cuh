// The first block of a VGG: conv3x3 of an image with up to 4 channels to 64, then conv3x3 of those, in one kernel.
//
// The first convolution's values for the second one's halo are computed into shared memory, where conv3x3_mma would
// have copied them: 18 x 18 pixels for 16 x 16, a quarter of them twice in the grid. Then it goes on as conv3x3_mma
// does.
//
// The image comes as it lies in memory, rows of 20 pixels of cin channels, 16 bytes at a time and whole sectors: those
// that a row begins and ends in would be moved anyway. In shared memory each row begins where it does within a sector
// of global memory, and the rows are `pitch` apart, which is a row of the image modulo 32: so addresses are linear.
//
// The first convolution as a product: 16 pixels x k. What a pixel needs of an image row is a run of 3 * cin
// neighbouring elements; k runs through the 4-byte words that hold it. Where cin is odd, every other run begins in the
// middle of a word: then the first half of its first word is masked, else the second half of its last. The pixels of a
// product are of one kind, so that one set of weights, masked in the same way, serves all of them:
//
//   word   l < 3: t of kernel row l; from 3 on: what is left over, word 4 (and 5) of kernel rows 0, 1, 2
//   k      2 * word, 2 * word + 1; l names the register of the operand, t = lane % 4
#pragma once

#include <type_traits>

#include "block1_cuda.h"
#include "conv3x3_mma.cuh"

namespace vgg_fast::cuda {

template <typename T>
struct Block1 : MmaTraits<T, 2> {
  using Second = MmaTraits<T, 2>;
  static constexpr int kHalo = 18, kImage = 20;  // pixels in a row: of the middle map, of the image
  static constexpr int kMiddle = 325;            // pixels of a plane: see where the middle map is stored
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  static constexpr int kPlanes = kBlock1Channels / Second::kUnit;
  static constexpr int kWords = 5;  // of a lane, 4 * 5 >= 3 * 6

  static constexpr int kMiddleAt = kMmaWeightStages * Second::kWeightStage;
  static constexpr int kAffineAt = kMiddleAt + kPlanes * kMiddle * 16;
  static constexpr int kFirstAffineAt = kAffineAt + 2 * Second::kBn * 4;
  static constexpr int kImageAt = kFirstAffineAt + 2 * kBlock1Channels * 4;
  static constexpr int kWeightsAt = kImageAt + kImage * 224;
  static constexpr int kSharedBytes = kWeightsAt + kBlock1Channels * 9 * 4 * 2;
};

// The image around a tile: where it lies in the image, in memory and in shared memory. A pixel before the image or
// beside it has a place in memory, too: that of another pixel, or none.
struct ImageTile {
  int top, left;     // pixels
  int64_t first;     // byte of (top, left) in x
  int units;         // of 16 bytes to a row: all sectors that 20 pixels can touch
  int start, pitch;  // bytes: the same in shared memory, and from a row to the next

  __device__ ImageTile(const Block1Args& a, const Place& place) {
    const int n = place.strip / a.second.strips;
    top = 2 * (place.pair - place.strip * a.second.pairs) - 2;
    left = (place.strip - n * a.second.strips) * a.second.strip - 2;
    first = ((static_cast<int64_t>(n) * a.second.h + top) * a.second.w + left) * a.cin * 2;
    units = (40 * a.cin + 30 + 31) / 32 * 2;
    start = static_cast<int>(first & 31);
    pitch = 16 * units + a.second.w * a.cin * 2 % 32;
  }
};

template <typename T>
__device__ void load_image(const Block1Args& a, const ImageTile& tile, uint32_t image) {
  using B = Block1<T>;
  const int64_t row_bytes = int64_t{2} * a.second.w * a.cin, end = row_bytes * a.second.h * a.second.n;
  for (int i = threadIdx.x; i < B::kImage * tile.units; i += B::kThreads) {
    const int row = i / tile.units, unit = (i - row * tile.units) * 16, y = tile.top + row;
    const int64_t begin = tile.first + row * row_bytes;
    const int skew = static_cast<int>(begin & 31);  // of the row in its first sector
    if (unit >= (skew + 2 * B::kImage * a.cin + 31) / 32 * 32) continue;
    const int64_t from = begin - skew + unit, left = end - from;
    const bool exists = y >= 0 && y < a.second.h && from >= 0 && left > 0;
    // Nothing is read where the size is 0, wherever the address may lie.
    ptx::cp_async(image + tile.start + row * tile.pitch - skew + unit, static_cast<const char*>(a.x) + from,
                  exists ? (left < 16 ? static_cast<int>(left) : 16) : 0);
  }
}

// Zeros where the image has no column: pixels of the rows above and below came in their place.
template <typename T>
__device__ void clear_padding(const Block1Args& a, const ImageTile& tile, unsigned char* image) {
  using B = Block1<T>;
  if (tile.left >= 0 && tile.left + B::kImage <= a.second.w) return;
  for (int i = threadIdx.x; i < B::kImage * B::kImage; i += B::kThreads) {
    const int row = i / B::kImage, column = i % B::kImage, x = tile.left + column;
    if (x >= 0 && x < a.second.w) continue;
    T* pixel = reinterpret_cast<T*>(image + tile.start + row * tile.pitch) + column * a.cin;
    for (int c = 0; c < a.cin; ++c) pixel[c] = T(0.0f);
  }
  __syncthreads();
}

// The middle map, 16 pixels of it at a time to a warp; zeros where it is the second convolution's padding.
template <typename T>
__device__ void first_convolution(const Block1Args& a, const ImageTile& tile, const unsigned char* image,
                                  const unsigned short* weights, const float* affine, unsigned char* middle) {
  using B = Block1<T>;
  const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int kind = warp / 2;  // whether the runs begin in the middle of a word, where they can
  const int run = 3 * a.cin, left_over = (run + 1) / 2 - 4;

  uint32_t mask[B::kWords], b[8][B::kWords];
  int offset[B::kWords];                          // words, from the first one of a pixel's run
  const int channel = group / 2 * 8 + group % 2;  // of the output, and 2 more for each j, 32 from j = 4 on:
#pragma unroll                                    // permuted as in WeightLoader
  for (int l = 0; l < B::kWords; ++l) {
    int kh = l, word = t;
    if (l >= 3) {
      const int further = 4 * (l - 3) + t;
      kh = left_over > 0 ? further >> (left_over - 1) : 3;
      word = 4 + further - kh * left_over;
    }
    const int k = 2 * word - ((kind & a.cin) + kh * a.cin * a.second.w) % 2;
    const bool low = kh < 3 && k >= 0 && k < run, high = kh < 3 && k + 1 < run;
    mask[l] = (low ? 0xffff : 0) | (high ? 0xffff0000 : 0);
    offset[l] = mask[l] ? (2 * (kind & a.cin & 1) + kh * tile.pitch) / 4 + word : 0;
    const int from = mask[l] ? (channel * 3 + kh) * run : 0;
    const unsigned short *lower = weights + from + (low ? k : 0), *upper = weights + from + (high ? k + 1 : 0);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int at = (j / 4 * 32 + j % 4 * 2) * 3 * run;
      b[j][l] = l == 4 && a.cin < 4 ? 0 : (lower[at] | static_cast<uint32_t>(upper[at]) << 16) & mask[l];
    }
  }
  float scale[2][8], shift[2][8];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    scale[i / 8][i % 8] = affine[32 * (i / 8) + 8 * t + i % 8];
    shift[i / 8][i % 8] = affine[kBlock1Channels + 32 * (i / 8) + 8 * t + i % 8];
  }

  // A row has 9 pixels of a kind: 9 products have 8 of each of two rows, the last two the ninth of all rows.
  // Neighbouring lanes store pixels that are 4 apart, and 4 planes of each: with planes 5 pixels apart, modulo 8, these
  // lie in 8 different banks of 16 bytes.
  constexpr int kEven = B::kHalo / 2;
  const int order = group % 2 * 2 + group / 2 % 2 + group / 4 * 4;
  for (int product = warp % 2; product < kEven + 2; product += 2) {
    int at[2];
    bool exists[2], inside[2];
    uint32_t x[B::kWords][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool ninth = product >= kEven;
      const int wanted = ninth ? 16 * (product - kEven) + order + 8 * i : 2 * product + i;
      const int row = min(wanted, B::kHalo - 1);
      const int column = 2 * (ninth ? 8 : order) + ((kind + tile.start / 2 + row * a.second.w) & 1);
      exists[i] = wanted < B::kHalo;
      const int y = tile.top + 1 + row, px = tile.left + 1 + column;
      at[i] = row * B::kHalo + column;
      inside[i] = y >= 0 && y < a.second.h && px >= 0 && px < a.second.w;
      const uint32_t* words =
          reinterpret_cast<const uint32_t*>(image) + (tile.start + row * tile.pitch + column * a.cin * 2) / 4;
#pragma unroll
      for (int l = 0; l < 4; ++l) x[l][i] = words[offset[l]] & mask[l];
      x[4][i] = a.cin == 4 ? words[offset[4]] & mask[4] : 0;
    }
    float sum[8][4] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      ptx::mma<T>(sum[j], x[0][0], x[0][1], x[1][0], x[1][1], b[j][0], b[j][1]);
      ptx::mma<T>(sum[j], x[2][0], x[2][1], x[3][0], x[3][1], b[j][2], b[j][3]);
    }
    if (a.cin == 4)
#pragma unroll
      for (int j = 0; j < 8; ++j) ptx::mma<T>(sum[j], x[4][0], x[4][1], 0, 0, b[j][4], 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!exists[i]) continue;
#pragma unroll
      for (int v = 0; v < 2; ++v) {  // 8 channels each
        float y[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) y[e] = fmaf(sum[4 * v + e / 2][2 * i + e % 2], scale[v][e], shift[v][e]);
        uint4 all = packed(y, T());
        if (a.relu) all = relu<typename B::Pair>(all);
        if (!inside[i]) all = make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4*>(middle + ((4 * v + t) * B::kMiddle + at[i]) * 16) = all;
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(Block1<T>::kThreads, 2) block1_kernel(const Block1Args a) {
  using B = Block1<T>;
  using K = typename B::Second;
  static_assert(B::kThreads == 128 && B::kThreads == 2 * kBlock1Channels);
  extern __shared__ __align__(16) unsigned char memory[];
  const uint32_t weights = ptx::shared_address(memory), middle = weights + B::kMiddleAt;
  float* affine = reinterpret_cast<float*>(memory + B::kAffineAt);
  float* first_affine = reinterpret_cast<float*>(memory + B::kFirstAffineAt);
  unsigned char* image = memory + B::kImageAt;
  const int first_position = blockIdx.x * K::kPositions;

  const ImageTile tile(a, place_of(a.second, first_position));
  load_image<T>(a, tile, weights + B::kImageAt);
  for (int i = threadIdx.x; i < kBlock1Channels * 9 * 2 / 16 * a.cin; i += B::kThreads)
    ptx::cp_async(weights + B::kWeightsAt + 16 * i, static_cast<const char*>(a.weight) + 16 * i, 16);
  ptx::cp_async_commit();
  WeightLoader<K> loader(a.second, 0, 0);
#pragma unroll
  for (int kw = 0; kw < 3; ++kw) {
    loader.load(a.second, weights + kw * K::kWeightStage, kw);
    ptx::cp_async_commit();
  }
  for (int i = threadIdx.x; i < 2 * K::kBn; i += K::kThreads)
    affine[i] = i % K::kBn < a.second.cout ? a.second.affine[i / K::kBn * a.second.cout + i % K::kBn] : 0.0f;
  first_affine[threadIdx.x] = a.affine[threadIdx.x];
  ptx::cp_async_wait<3>();
  __syncthreads();
  clear_padding<T>(a, tile, image);
  first_convolution<T>(a, tile, image, reinterpret_cast<const unsigned short*>(memory + B::kWeightsAt), first_affine,
                       memory + B::kMiddleAt);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int units[K::kUnits];
  fragment_rows<K>(a.second, first_position, warp, units);
  const int row = weight_row<K>(0);
  const uint32_t zero = ptx::unknown_zero();
  float acc[K::kUnits][K::kColumns][4] = {};
  constexpr int kChunks = kBlock1Channels / (2 * K::kUnit);
  for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
    for (int kw = 0; kw < 3; ++kw) {
      const int step = 3 * chunk + kw;
      ptx::cp_async_wait<2>();
      __syncthreads();  // the first time also for the middle map
      if (chunk + 1 < kChunks) loader.load(a.second, weights + (step + 3) % kMmaWeightStages * K::kWeightStage, kw);
      ptx::cp_async_commit();
      multiply<K>(a.second, units, middle + chunk * 2 * B::kMiddle * 16 + kw * 16,
                  weights + step % kMmaWeightStages * K::kWeightStage + row, zero, acc);
    }
  }
  const int channel = lane % 4 * K::kUnit;
  epilogue<K>(a.second, first_position + warp * K::kUnits * 8, channel, affine + channel, acc);
}

}  // namespace vgg_fast::cuda
