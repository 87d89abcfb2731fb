// The first block of a VGG: conv3x3 of an image with up to 4 channels to 64, then conv3x3 of those, in one kernel.
//
// The first convolution's values for the second one's halo are computed into shared memory, where conv3x3_mma would
// have copied them: 18 x 18 pixels for 16 x 16, a quarter of them twice in the grid. Then it goes on as conv3x3_mma
// does.
//
// The first one as a product: 16 pixels x (tap, channel of 4), a quarter of its 12 taps and its fourth channel zeros.
//   k = 4 * tap + channel, so that the two neighbouring k of a lane are one 4-byte word of one pixel of the image.
#pragma once

#include "block1_cuda.h"
#include "conv3x3_mma.cuh"

namespace vgg_fast::cuda {

template <typename T>
struct Block1 : MmaTraits<T, 2> {
  using Second = MmaTraits<T, 2>;
  static constexpr int kHalo = 18, kImage = 20;  // pixels in a row: of the middle map, of the image
  static constexpr int kPixels = kHalo * kHalo;
  static constexpr int kMiddle = 326;  // pixels of a plane: 6 modulo 8, four planes in other banks
  static constexpr int kPlanes = kBlock1Channels / Second::kUnit;
  static constexpr int kSteps = 3, kTaps = 10;  // of 16 k; taps there are weights for, the tenth's are zeros
  static constexpr int kWeightRow = 4 * kTaps;  // elements: 20 words, rows of 8 channels in other banks

  static constexpr int kMiddleAt = kMmaWeightStages * Second::kWeightStage;
  static constexpr int kAffineAt = kMiddleAt + kPlanes * kMiddle * 16;
  static constexpr int kFirstAffineAt = kAffineAt + 2 * Second::kBn * 4;
  static constexpr int kTableAt = kFirstAffineAt + 2 * kBlock1Channels * 4;
  static constexpr int kImageAt = kTableAt + kPixels * 4;
  static constexpr int kWeightsAt = kImageAt + kImage * kImage * 8;
  static constexpr int kSharedBytes = kWeightsAt + kBlock1Channels * kWeightRow * 2;
};

// The image around a tile, 4 channels to a pixel; zeros outside of it and in the channels that there are not.
template <typename T>
__device__ void load_image(const Block1Args& a, const Place& first, T* image) {
  using B = Block1<T>;
  const int n = first.strip / a.second.strips;
  const int left = (first.strip - n * a.second.strips) * a.second.strip - 2;
  const int top = 2 * (first.pair - first.strip * a.second.pairs) - 2;
  for (int i = threadIdx.x; i < B::kImage * B::kImage * 4; i += B::kThreads) {
    const int row = i / (4 * B::kImage), in_row = i - row * 4 * B::kImage;
    const int column = in_row / a.cin, c = in_row - column * a.cin;  // neighbours in memory to neighbouring threads
    const int y = top + row, x = left + column;
    if (column >= B::kImage) continue;
    T value = T(0.0f);
    if (n < a.second.n && y >= 0 && y < a.second.h && x >= 0 && x < a.second.w)
      value = static_cast<const T*>(a.x)[((static_cast<int64_t>(n) * a.second.h + y) * a.second.w + x) * a.cin + c];
    image[(row * B::kImage + column) * 4 + c] = value;
  }
  for (int i = threadIdx.x; i < B::kImage * B::kImage; i += B::kThreads)
    for (int c = a.cin; c < 4; ++c) image[i * 4 + c] = T(0.0f);
}

// weight, output channels permuted as in WeightLoader, [64][tap][4].
template <typename T>
__device__ void load_first_weights(const Block1Args& a, T* to) {
  using B = Block1<T>;
  for (int i = threadIdx.x; i < kBlock1Channels * B::kTaps * 4; i += B::kThreads) {
    const int row = i / B::kWeightRow, tap = i % B::kWeightRow / 4, c = i % 4;
    const int co = row / 32 * 32 + row % 8 / 2 * 8 + row % 32 / 8 * 2 + row % 2;
    const bool exists = tap < 9 && c < a.cin;
    to[i] = exists ? static_cast<const T*>(a.weight)[(co * 9 + tap) * a.cin + c] : T(0.0f);
  }
}

// The middle map, 16 pixels of it at a time to a warp; zeros where it is the second convolution's padding.
template <typename T>
__device__ void first_convolution(const Block1Args& a, const T* image, const T* weights, const float* affine,
                                  const int* table, unsigned char* middle) {
  using B = Block1<T>;
  const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
  uint32_t b[8][B::kSteps][2];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t* row = reinterpret_cast<const uint32_t*>(weights + (j * 8 + group) * B::kWeightRow) + t;
#pragma unroll
    for (int s = 0; s < B::kSteps; ++s) {
      b[j][s][0] = row[8 * s];
      b[j][s][1] = s < 2 ? row[8 * s + 4] : 0;
    }
  }
  for (int first = threadIdx.x / 32 * 16; first < B::kPixels; first += B::kThreads / 32 * 16) {
    float sum[8][4] = {};
    const uint32_t* pixel[2];  // this lane's words of the upper left neighbours of its two pixels
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = min(first + group + 8 * i, B::kPixels - 1);
      pixel[i] = reinterpret_cast<const uint32_t*>(image) + (at / B::kHalo * B::kImage + at % B::kHalo) * 2 + t % 2;
    }
#pragma unroll
    for (int s = 0; s < B::kSteps; ++s) {
      uint32_t x[2][2];  // [which half of k][pixel]
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int tap = 4 * s + 2 * half + t / 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) x[half][i] = tap < 9 ? pixel[i][(tap / 3 * B::kImage + tap % 3) * 2] : 0;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) ptx::mma<T>(sum[j], x[0][0], x[0][1], x[1][0], x[1][1], b[j][s][0], b[j][s][1]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = first + group + 8 * i;
      if (at >= B::kPixels) continue;
#pragma unroll
      for (int v = 0; v < 2; ++v) {  // 8 channels each
        const int channel = 32 * v + 8 * t;
        float y[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          y[e] = fmaf(sum[4 * v + e / 2][2 * i + e % 2], affine[channel + e], affine[kBlock1Channels + channel + e]);
          if (a.relu && y[e] < 0.0f) y[e] = 0.0f;
          if (table[at] < 0) y[e] = 0.0f;
        }
        *reinterpret_cast<uint4*>(middle + ((4 * v + t) * B::kMiddle + at) * 16) = packed(y, T());
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(Block1<T>::kThreads, 2) block1_kernel(const Block1Args a) {
  using B = Block1<T>;
  using K = typename B::Second;
  extern __shared__ __align__(16) unsigned char memory[];
  const uint32_t weights = ptx::shared_address(memory), middle = weights + B::kMiddleAt;
  float* affine = reinterpret_cast<float*>(memory + B::kAffineAt);
  float* first_affine = reinterpret_cast<float*>(memory + B::kFirstAffineAt);
  int* table = reinterpret_cast<int*>(memory + B::kTableAt);
  T* image = reinterpret_cast<T*>(memory + B::kImageAt);
  T* first_weights = reinterpret_cast<T*>(memory + B::kWeightsAt);
  const int first_position = blockIdx.x * K::kPositions;

  WeightLoader<K> loader(a.second, 0, 0);
#pragma unroll
  for (int kw = 0; kw < 3; ++kw) {
    loader.load(a.second, weights + kw * K::kWeightStage, kw);
    ptx::cp_async_commit();
  }
  fill_table<K>(a.second, first_position, table);
  for (int i = threadIdx.x; i < 2 * K::kBn; i += K::kThreads)
    affine[i] = i % K::kBn < a.second.cout ? a.second.affine[i / K::kBn * a.second.cout + i % K::kBn] : 0.0f;
  for (int i = threadIdx.x; i < 2 * kBlock1Channels; i += K::kThreads) first_affine[i] = a.affine[i];
  load_image(a, place_of(a.second, first_position), image);
  load_first_weights(a, first_weights);
  __syncthreads();
  first_convolution(a, image, first_weights, first_affine, table, memory + B::kMiddleAt);

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
