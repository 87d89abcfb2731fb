// The gradient of a 3x3 convolution in its weight, over channels_last maps. Plain C++.
//
//   dw[o][i][tap] = sum over images and pixels of  x[pixel + tap][i] * dy[pixel][o]
//
// Every method makes it a matrix product whose inner dimension are pixels (direct, AMX) or tiles of 4x4 of them
// (Winograd), cut into slots that depend on the shape alone. A slot's sums are added up in one order, and then the
// slots in theirs: hence the same bits for any number of threads.
//
//   sums   [slot][i / block_in][o / block_out][block_in][9][block_out]     fp32
//            +- parallel ---------------------+
#pragma once
#include <string>

#include "../conv3x3.h"

namespace vgg_fast {

struct WeightGradArgs {
  const char* x;   // [n][h][w][cin]
  const char* dy;  // [n][h][w][cout]
  DType type;      // of both
  int64_t n, h, w, cin, cout;
};

constexpr int64_t kAheadFloats = 8;

// What an instruction set offers in fp32. Operands come in blocks of 16 channels: [block][k][16] with some distance
// between the blocks.
struct WeightGradF32 {
  const char* name;
  int64_t rows;  // most rows of x of one call of `outer`
  // m[row][16 * blocks] (+)= sum over k of v[k][row] * w[k][...]: `rows` channels of x by one or two blocks of dy. On
  // the way it fetches kAheadFloats * count floats from `ahead` on into L2.
  void (*outer)(const float* v, int64_t rows, const float* w, int64_t w_block, int64_t blocks, int64_t count,
                bool first, float* m, int64_t m_row, const float* ahead);
  // Winograd F(3x3, 4x4), the transpose of the F(4x4, 3x3) of winograd.h:
  //   dg = G^T [ sum over tiles of (B^T d B) . (A dY A^T) ] G        d: 6x6 of x, dY: 4x4 of dy
  // Tiles [begin, end) of 16 channels from `channel` on, to [36 planes][tile][16]; null where there is no Winograd.
  void (*transform_x)(const WeightGradArgs& args, int64_t channel, int64_t begin, int64_t end, float* v, int64_t plane);
  void (*transform_dy)(const WeightGradArgs& args, int64_t channel, int64_t begin, int64_t end, float* w,
                       int64_t plane);
  // `vectors` times 16 sums of each of the 36 planes to sums of the 9 taps, which are added to `out` unless first.
  void (*transform_back)(const float* m, int64_t plane, int64_t vectors, bool first, float* out, int64_t tap);
};

extern const WeightGradF32 kWeightGradPortable, kWeightGradAvx2, kWeightGradAvx512;

// How a CPU micro-kernel's weight gradient is computed: by AMX (bf16 tensors only), Winograd where it pays, or
// directly.
struct WeightGrad {
  const char* kernel;  // of microkernels.inc
  bool amx, winograd;
  const WeightGradF32* f32;
};

const WeightGrad& weight_grad_of(const std::string& kernel);

// AMX. A row of a map is `pitch` pixels long, and a pixel's neighbours are at constant distances:
//   x    [cin blocks of 16][16][row_bytes / 2]   pixel (row, column) at (row + 1) * pitch + column + 1
//   dy   [cout blocks of 16][pairs][16][2]       pixel (row, column) at row * pitch + column; zeros in between
struct WeightGradAmx {
  int64_t h, w, pitch, pixels;                       // pitch is even; pixels: h * pitch, rounded up to whole tiles
  int64_t x_row_bytes, x_image, dy_block, dy_image;  // bytes: of one channel, of an image, of 16 channels, of an image
  static constexpr int64_t kChunk = 256;  // pixels whose operands, 32 by 32 channels, stay in L1 over the nine taps

  WeightGradAmx(int64_t height, int64_t width, int64_t cin, int64_t cout)
      : h(height), w(width), pitch((width + 3) / 2 * 2), pixels(ceil_div(height * pitch, 32) * 32) {
    // Channels are nine lines apart modulo 4 KB, so that those of a chunk spread over the sets of L1.
    x_row_bytes = ceil_div(2 * (pixels + 2 * pitch + 2), 4096) * 4096 + 9 * kLine;
    x_image = ceil_div(cin, 32) * 32 * x_row_bytes;
    dy_block = pixels * 32;
    dy_image = ceil_div(cout, 32) * 2 * dy_block;
  }
  int64_t chunks() const { return ceil_div(pixels, kChunk); }
};

// A row of all channels (zeros where there are none) of an image's operand, and the border around it. Row by row, so
// that each line of the map is fetched once.
void weight_grad_pack_x_amx(const WeightGradArgs& args, const WeightGradAmx& plan, int64_t image, int64_t row, char* x);
void weight_grad_pack_dy_amx(const WeightGradArgs& args, const WeightGradAmx& plan, int64_t image, int64_t row,
                             char* dy);
// sums [32][9][32] of chunks [begin, end) of all images; chunk c is of image c / chunks().
void weight_grad_amx(const WeightGradAmx& plan, const char* x, const char* dy, int64_t begin, int64_t end, float* sums);

}  // namespace vgg_fast
