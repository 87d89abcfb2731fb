// What the fully connected layers' Torch-facing file and kernels agree on: y = relu(x weight^T + bias). Plain C++.
//
// At batch 1 every weight is used once, so that the speed is that of memory. Kernels read PyTorch's own weights, row by
// row as they lie there; only fp32 weights that may lose digits (f24, or bf16 at "medium") are packed.
//
//   weights  [out][in] values, rows weight_row bytes apart
//   inputs   as PreparedX says, made anew in every call: they are few
//
// The order of summation of every output depends on `in` alone: the same bits for every batch size, position and number
// of threads.
#pragma once
#include "conv3x3.h"

namespace vgg_fast {

// f24: an fp32 value rounded to its upper 24 bits (off by 2^-16 of it at most), 3 bytes each, rows padded to 16 values.
enum class WeightFormat { f32, bf16, f16, f24 };

constexpr int64_t kRowValues = 16;  // what rows of f24 weights and of inputs are padded to

// Bytes of a row of `in` values in memory of our own.
constexpr int64_t packed_row(WeightFormat format, int64_t in) {
  return format == WeightFormat::f24   ? ceil_div(in, kRowValues) * kRowValues * 3
         : format == WeightFormat::f32 ? in * 4
                                       : in * 2;
}

struct LinearArgs {
  const char* weight;
  int64_t weight_row;
  WeightFormat format;
  const char* x;      // float [images][padded in], or for tiles [blocks][in / 32][16][columns] words of two bf16
  int64_t columns;    // images per block of the latter, 16 at most
  const float* bias;  // [out], or nullptr
  char* y;            // [images][out]
  int64_t in, out, images;
  bool relu;
  DType store_as;
};

// Rows [begin, end) of the weights, for all images. scratch: scratch_bytes(images), 64-byte aligned.
using LinearFn = void (*)(const LinearArgs& args, int64_t begin, int64_t end, char* scratch);

struct LinearKernel {
  const char* name;
  const char* flags;  // CPU flags it needs, separated by blanks
  bool tiles;         // multiplies tiles of bf16 pairs: weights are bf16, inputs are rounded to it
  bool f24;           // takes f24 weights, and nothing else; otherwise weights of the inputs' own type
  Precision error;    // what its error is good for
  LinearFn run;

  // Rows of one call: few while the weights stream past once, more where they are to be used again and again.
  int64_t unit_rows(int64_t images) const { return tiles ? (images <= 32 ? 32 : 128) : (images <= 3 ? 8 : images <= 16 ? 32 : 64); }
  int64_t scratch_bytes(int64_t images) const { return unit_rows(images) * (ceil_div(images, 16) * 16) * kLine; }
  // The format that weights of a type are read in.
  WeightFormat format(DType dtype) const {
    if (f24) return WeightFormat::f24;
    if (tiles || dtype == DType::bf16) return WeightFormat::bf16;
    return dtype == DType::f32 ? WeightFormat::f32 : WeightFormat::f16;
  }
  bool packs(DType dtype) const { return dtype == DType::f32 && format(dtype) != WeightFormat::f32; }
};

// Images that one pass over the weights serves: their inputs and sums stay in L2.
constexpr int64_t kPassImages = 128;

const LinearKernel* linear_kernels_begin();
const LinearKernel* linear_kernels_end();

void linear_portable_f32(const LinearArgs&, int64_t begin, int64_t end, char* scratch);
void linear_avx2_f32(const LinearArgs&, int64_t begin, int64_t end, char* scratch);
void linear_avx512_f32(const LinearArgs&, int64_t begin, int64_t end, char* scratch);
void linear_avx512_f24(const LinearArgs&, int64_t begin, int64_t end, char* scratch);
void linear_amx_bf16(const LinearArgs&, int64_t begin, int64_t end, char* scratch);

}  // namespace vgg_fast
