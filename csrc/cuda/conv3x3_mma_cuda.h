// conv3x3 on tensor cores (sm_80 and later) as the Torch-facing file and the planner see it: no torch, no CUDA headers.
//
// The pixels of a tile are numbered along row pairs of strips of the image:
//
//   image n, cut in `strips` strips of `strip` columns; each strip is `pairs` pairs of rows
//     position = ((n * strips + s) * pairs + pair) * strip + column      2 pixels: the upper and the lower of the pair
//   unit     = 8 neighbouring positions = 16 pixels: the 16 rows of one mma, upper pixels first
//   tile     = bm / 16 neighbouring units, wherever a row, a strip or an image ends: no pixel is computed for nothing
//              but those of a strip wider than what is left of the image, of an odd last row, and of the last tile
//
// In shared memory the pixels that a tile reads, its halo, lie in rows of `pitch` pixels:
//
//     pixel = 2 * pitch * (position / strip - first row pair) + pad * (strips begun since) + row * pitch + column
//
// with row in 0 .. 3 (the row above the pair first) and column in 0 .. strip + 1. 2 * pitch = strip and pad = 0 modulo
// 8: so 8 neighbouring positions, shifted by whatever tap, are 8 pixels that differ modulo 8, and with 16 bytes per
// pixel one ldmatrix reads them without a bank conflict.
#pragma once

#include <cstdint>

#include "launch_cuda.h"

namespace vgg_fast::cuda {

// What a CTA computes: bm pixels x bn output channels; a warp of it units * 16 pixels x columns * 8 channels.
struct MmaTile {
  const char* name;
  int bm, bn, units, columns;
  int resident;  // CTAs that share a multiprocessor

  constexpr int warps_m() const { return bm / (16 * units); }
  constexpr int warps_n() const { return bn / (8 * columns); }
  constexpr int warps() const { return warps_m() * warps_n(); }
};

constexpr MmaTile kMmaTiles[] = {
    {"256x128", 256, 128, 4, 8, 1}, {"128x64", 128, 64, 4, 4, 3}, {"256x64", 256, 64, 4, 8, 2}};
constexpr int kMmaWeightStages = 4, kMmaHaloStages = 2;

// How a problem is cut; all a launch needs beside the pointers.
struct MmaPlan {
  int tile;               // index into kMmaTiles
  int strip, strips;      // columns of a strip, strips of an image
  int pairs;              // of rows in an image
  int pitch, pad;         // pixels, see above
  int halo;               // pixels of shared memory for one stage of the halo; 4 modulo 8, so that the two 16-byte
                          // planes of a stage lie in different banks
  int rows, columns;      // tiles of pixels, tiles of channels
  int split;              // CTAs that share the sum of a tile
  int shared_bytes;       // of a CTA, dynamic
  int64_t partial_bytes;  // of the workspace for partial sums, and of the counters behind them; 0 unless split
  int64_t counter_bytes;
  double clocks;  // estimated, of an A100; what the choice was made by
};

struct MmaProblem {
  int64_t n, h, w, cin, cout;
  DType dtype;  // kFloat32: as tf32
};

// Null, or why there is no tensor-core kernel for the problem.
const char* mma_unsupported(const MmaProblem& problem);

// The best plan for a GPU of so many multiprocessors, a pure function. tile and split may be forced (-1, 0: free).
MmaPlan plan_mma(const MmaProblem& problem, int multiprocessors, int tile = -1, int split = 0);

//   sum[n, y, x, co] = sum over kh, kw, ci of x[n, y + kh - 1, x + kw - 1, ci] * weight[co, kh, kw, ci]
//   y[n, y, x, co]   = relu(scale[co] * sum[n, y, x, co] + shift[co])
struct MmaArgs {
  const void* x;        // [n, h, w, cin], dtype
  const void* weight;   // [cout, 3, 3, cin], dtype
  const float* affine;  // [2, cout]: scale >= 0, so that the maximum may be taken over the sums, and shift
  void* out;            // y: [n, h, w, cout], dtype, or null
  void* pooled;         // y's maxima over 2x2 windows: [n, h / 2, w / 2, cout], dtype, or null
  float* partial;       // [tiles, split, bm * bn], or null without split
  unsigned* arrived;    // [tiles] zeros, and zeros afterwards
  int n, h, w, cin, cout;
  int strip, strips, pairs, pitch, pad, halo;
  int columns, split;
  bool relu;
};

// Fills in what follows from the plan.
MmaArgs mma_args(const MmaProblem& problem, const MmaPlan& plan);

// Queues the kernel. Returns null, or CUDA's message where the launch was refused.
const char* launch_conv3x3_mma(const MmaArgs& args, DType dtype, const MmaPlan& plan, Queue queue);

}  // namespace vgg_fast::cuda
