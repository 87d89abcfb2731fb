// The passes around a convolution under gradients, over channels_last maps [n][h][w][c]. Plain C++.
//
//   value      v = max_pool(relu(round(z * scale + shift)))
//   gradient   g = dy where v came from and relu let it pass, else 0
//              dz = g * factor + ((z - mean) * slope + offset)          (the brackets for batch statistics only)
//
// What is saved for the gradient is z alone: masks and the pool's choice (the first of equals, the last of NaNs) are
// found again by the same arithmetic; or else a mask is. No sum is shared by threads: every unit of rows leaves its own
// partial sums behind, which are added up in the order of the units.
#pragma once
#include <string>

#include "../conv3x3.h"

namespace vgg_fast {

struct PassArgs {
  const char* z;                                // [n][h][w][c]
  const char* dy;                               // [n][h or h / 2][w or w / 2][c]
  char* out;                                    // y, as dy; or dz, as z
  double* sums;                                 // [units][2][c]
  const float *scale, *shift;                   // [c]
  const float *factor, *mean, *slope, *offset;  // [c]; mean, slope and offset may be null
  int64_t n, h, w, c;                           // of z
  DType type;                                   // of all maps
  bool relu, pool;
  const char* mask;  // in place of z, see conv3x3.h; may be null

  int64_t out_h() const { return pool ? h / 2 : h; }
  int64_t out_w() const { return pool ? w / 2 : w; }
  // A unit is some rows of the result (with pool: pairs of rows of z) of one image: about as many pixels as keep
  // sums in fp32 short.
  int64_t unit_rows() const { return 1 + kUnitPixels / (w * (pool ? 2 : 1)); }
  int64_t image_units() const { return ceil_div(pool ? (h + 1) / 2 : h, unit_rows()); }
  int64_t units() const { return n * image_units(); }

  static constexpr int64_t kUnitPixels = 128;
};

// One output group's lanes and one block's channels of a packed weight (see conv3x3.h), from a weight whose nine taps
// are neighbours in memory. Of fp32 or bf16, which it stays.
struct PackArgs {
  const char* from;         // lane 0, channel 0
  const char* end;          // of the weight
  int64_t lane, channel;    // elements from one to the next
  int64_t lanes, channels;  // that exist; zeros take the place of the others
  int64_t group;            // lanes that there are
  bool reversed;            // taps from the last one on
  const float* sign;        // [lanes], multiplied in
  char* to;                 // [9][16][group] words
  DType type;
};

// Each works on one unit.
using PassFn = void (*)(const PassArgs& args, int64_t unit);

struct Passes {
  const char* name;
  const char* flags;     // CPU flags they need
  PassFn value;          // out = v
  PassFn moments;        // sums = mean over the unit, sum of squared distances from it
  PassFn gradient;       // out = dz
  PassFn gated;          // out = dz, of a mask instead of z
  PassFn gradient_sums;  // sums = sum of g, sum of g * (z - mean)
  // to[c * to_row + r] = from[r * from_row + c] for all rows r and columns c, in fp32 or bf16; returns whether all of
  // them are finite.
  bool (*transpose)(const float* from, int64_t from_row, int64_t rows, int64_t columns, char* to, int64_t to_row,
                    DType type);
  // The nine taps of a weight's channels, see PackArgs.
  void (*pack_taps)(const PackArgs& args);
};

// The best that `flags` can run. All give the same bits.
const Passes& select_passes(const std::string& flags);

extern const Passes kPassesPortable, kPassesAvx2, kPassesAvx512;

}  // namespace vgg_fast
