// What the Torch-facing files and the micro-kernels agree on. Plain C++: no torch, no intrinsics.
//
// Layouts (b = 16 fp32 or 32 bf16 channels: one channel block of one pixel is one 64-byte cache line)
//
//   activations  [C / b][parts][H + 2][W + 2][b]     a border of zeros is the padding
//                  +- block -+- part -+- row -+- pixel -+
//   a tap is a constant offset from a pixel
//
//   weights      [Cout / g][Cin / b][parts][9][16][g] words  g = channels per group, a property of the micro-kernel
//                  +- group -+- block -+- part -+- tap -+- word -+- lane -+
//   a word is 4 bytes: one fp32 channel, or two neighbouring bf16 channels (VNNI)
//
// parts is 1, or the number of bf16 values whose sum stands for one fp32 value: x = x1 + x2 (+ x3), each the rounding
// of what the ones before it left over.
//
// The order of summation of every output is block, tap, part, word: it depends on nothing but Cin, hence the same bits
// for every batch size, position and number of threads.
#pragma once
#include <cstddef>
#include <cstdint>

namespace vgg_fast {

constexpr int64_t kLine = 64;   // bytes of one channel block of one pixel
constexpr int64_t kWords = 16;  // words in it
constexpr int64_t kTaps = 9;
constexpr int64_t kVector = 16;  // output channels of one store of the epilogue

enum class DType { f32, bf16, f16 };

// What PyTorch calls the precision of float32: highest is that of fp32, high at least that of tf32 or three bf16
// products, medium that of one bf16 product.
enum class Precision { highest, high, medium };

constexpr int64_t element_size(DType t) { return t == DType::f32 ? 4 : 2; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The first whole line from here on.
inline char* next_line(void* memory) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + kLine - 1) / kLine * kLine);
}

// Where a convolution writes: a blocked map, or an image of a tensor.
struct Output {
  char* data;      // of output pixel (0, 0) of channel 0
  int64_t pixel;   // bytes from one output pixel to the next,
  int64_t row;     // from one output row to the next,
  int64_t group;   // from one channel group to the next,
  int64_t vector;  // from one 16-channel vector of a group to the next,
  int64_t part;    // and from one part to the next; 0 if the values are in one piece
  int64_t stored;  // channels that there is room for, a multiple of 16
  DType type;      // of the values in memory
};

// Where a gradient passes: a bit for every value of a convolution's result [ceil(c / 16)][h][w][16 bits], set if the
// ReLU let it pass and the pool chose it (of equals the first, of NaNs the last).
inline int64_t mask_bytes(int64_t c, int64_t h, int64_t w) { return ceil_div(c, kVector) * h * w * 2; }

// Where a convolution with a transposed weight computes a gradient: it goes on through the mask of the map it is for,
// whose pixels were `pooled` or not.
struct Gate {
  const char* mask;  // null: there is none
  int64_t h, w;      // of the mask
  bool pooled;       // the result is that of windows: pixel (i, j) goes to the chosen one of (2i .. 2i+1, 2j .. 2j+1)
};

// One convolution of one image, or of a strip of its rows: y = relu(conv(x, weight) * scale + shift), pooled where
// asked.
struct Conv3x3Args {
  const char* x;           // [cin_blocks][parts][h + 2][w + 2][16] words, or those rows of it that are needed
  int64_t x_plane;         // bytes from one [h + 2][w + 2][16] to the next
  const uint32_t* weight;  // [groups][cin_blocks][parts][taps][16][g] words
  const float* scale;      // [groups * g], > 0 (the sign is in the weights), so that pooling may come first
  const float* shift;      // [groups * g]
  Output y;
  Output tap;    // the values before pooling as well, if its data is not null
  int64_t h, w;  // of the convolution, before pooling
  int64_t cin_blocks;
  int64_t last_words;  // words of the last block that hold channels; the others are never multiplied by inf or NaN
  int64_t cout;        // channels that exist; the lanes past them are written as zeros
  int64_t taps;        // 9; 1 when x holds the 3x3 neighbourhoods themselves (im2col)
  bool relu, pool;
  DType round_to;  // precision of the result
  char* mask;      // what a gradient passes of the result before pooling, written if not null
  Gate gate;
  // What this thread reads next: lines that a kernel may fetch into L2 while it computes.
  const char* next;
  int64_t next_lines;
};

// Convolution rows [row_begin, row_end) of one group of output channels; row_begin is even when pooling.
// scratch: scratch_floats(w) floats, 64-byte aligned.
using Conv3x3Fn = void (*)(const Conv3x3Args& args, int64_t group, int64_t row_begin, int64_t row_end, float* scratch);

// The two stages of a Winograd kernel (cpu/winograd.h): the units of the first one fill `shared`, then those of the
// second read it. Units of a stage are independent of one another. The images of the plan have one weight.
struct WinogradPlan;
using WinogradPrepareFn = void (*)(const Conv3x3Args* images, const WinogradPlan& plan, int64_t unit, float* shared);
using WinogradRunFn = void (*)(const Conv3x3Args* images, const WinogradPlan& plan, int64_t unit, const float* shared,
                               float* scratch);

struct MicroKernel {
  const char* name;
  const char* flags;  // CPU flags it needs, separated by blanks
  DType compute;      // type of the words: f32, or bf16 pairs
  int64_t parts;      // bf16 values per fp32 value: 2 for three products, 3 for six
  Precision error;    // what its error is good for
  int64_t group;      // output channels of one call
  int64_t rows;       // convolution rows that one call works on best, even
  bool im2col;        // wants the neighbourhoods of a first layer (9 * Cin <= 32) laid out by pixel
  Conv3x3Fn run;
  WinogradPrepareFn winograd_prepare = nullptr;  // layers that F(4x4) pays for take these two instead of `run`
  WinogradRunFn winograd_run = nullptr;

  int64_t block() const { return compute == DType::f32 ? kWords : 2 * kWords; }  // channels per block
  bool gathers(int64_t cin) const { return im2col && kTaps * cin <= block(); }
  int64_t groups(int64_t cout) const { return ceil_div(cout, group); }
  int64_t cin_blocks(int64_t cin) const { return gathers(cin) ? 1 : ceil_div(cin, block()); }
  int64_t taps(int64_t cin) const { return gathers(cin) ? 1 : kTaps; }
  // Words of a packed weight, and floats of the scratch that `run` needs for maps of this width.
  int64_t weight_words(int64_t cout, int64_t cin) const {
    return groups(cout) * cin_blocks(cin) * parts * taps(cin) * kWords * group;
  }
  // Two rows, or the two times two tiles of 16 pixels that AMX has under way.
  int64_t scratch_floats(int64_t w) const { return (w < 32 ? 64 : 2 * w) * group; }
};

// `vectors` x 16 floats as sums of `parts` bf16 values, part p at to + p * stride bytes. For the kernels with parts
// > 1.
void split_parts_avx512(const float* from, int64_t vectors, char* to, int64_t stride, int64_t parts);

// The table, best first, and its end.
const MicroKernel* microkernels_begin();
const MicroKernel* microkernels_end();

void conv3x3_portable_f32(const Conv3x3Args&, int64_t group, int64_t row_begin, int64_t row_end, float* scratch);
void conv3x3_avx2_f32(const Conv3x3Args&, int64_t group, int64_t row_begin, int64_t row_end, float* scratch);
void conv3x3_avx512_f32(const Conv3x3Args&, int64_t group, int64_t row_begin, int64_t row_end, float* scratch);
void conv3x3_avx512_bf16(const Conv3x3Args&, int64_t group, int64_t row_begin, int64_t row_end, float* scratch);
void conv3x3_amx_bf16(const Conv3x3Args&, int64_t group, int64_t row_begin, int64_t row_end, float* scratch);
void conv3x3_amx_bf16x3(const Conv3x3Args&, int64_t group, int64_t row_begin, int64_t row_end, float* scratch);
void conv3x3_amx_bf16x6(const Conv3x3Args&, int64_t group, int64_t row_begin, int64_t row_end, float* scratch);
void conv3x3_avx2_winograd_f32(const Conv3x3Args&, int64_t group, int64_t row_begin, int64_t row_end, float* scratch);
void winograd_prepare_avx2_winograd_f32(const Conv3x3Args*, const WinogradPlan&, int64_t unit, float* shared);
void winograd_run_avx2_winograd_f32(const Conv3x3Args*, const WinogradPlan&, int64_t unit, const float* shared,
                                    float* scratch);
void conv3x3_avx512_winograd_f32(const Conv3x3Args&, int64_t group, int64_t row_begin, int64_t row_end, float* scratch);
void winograd_prepare_avx512_winograd_f32(const Conv3x3Args*, const WinogradPlan&, int64_t unit, float* shared);
void winograd_run_avx512_winograd_f32(const Conv3x3Args*, const WinogradPlan&, int64_t unit, const float* shared,
                                      float* scratch);

}  // namespace vgg_fast
