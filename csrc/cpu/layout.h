// Between PyTorch's strided tensors and the layouts of conv3x3.h. Plain C++.
#pragma once
#include "batch_norm.h"

namespace vgg_fast {

// One image of a strided tensor; strides count elements.
struct Image {
  char* data;
  DType dtype;
  int64_t c, h, w;
  int64_t stride_c, stride_h, stride_w;
};

// Bytes of a blocked map of `planes` = blocks x parts with its border, and the slack after it that whole AMX tiles may
// read (and drop).
int64_t map_bytes(int64_t planes, int64_t h, int64_t w);

// Row `row` (0 .. h + 1, the border included) of the image's map: its line in the first plane goes to `to`, the other
// planes are `plane` bytes apart.
void pack_row(const Image& image, const MicroKernel& kernel, int64_t row, char* to, int64_t plane);

// Rows [row_begin, row_end) of 0 .. h - 1 of the map whose pixels are the image's 3x3 neighbourhoods, [tap][channel],
// zero-padded; where they go as above.
void gather_rows(const Image& image, const MicroKernel& kernel, int64_t row_begin, int64_t row_end, char* to,
                 int64_t plane);

// Zeros in the border columns of a plane, and in the border row above it and below it.
void clear_border(char* plane, int64_t h, int64_t w, bool top, bool bottom);

// Row `row` of an image from that of another of the same dtype and size, which may have more channels.
void copy_row(const Image& from, const Image& to, int64_t row);

// A plain OIHW weight; strides count elements.
struct Weight {
  const char* data;
  DType dtype;
  int64_t cout, cin;
  int64_t stride[4];
  const float* sign;  // [cout] of +1, -1 or 0, multiplied in
};

// A packed weight (see conv3x3.h) is made in units, independent of one another; channels and words that do not exist
// are zeros.
int64_t weight_units(const Weight& weight, const MicroKernel& kernel);
void pack_weight_unit(const Weight& weight, const MicroKernel& kernel, const Passes& passes, uint32_t* packed,
                      int64_t unit);

}  // namespace vgg_fast
