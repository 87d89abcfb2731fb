// One convolution of a chain: which kernel runs it, cut how, with what memory. Decided before anything is launched.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "conv3x3_cuda.h"
#include "conv3x3_mma_cuda.h"
#include "conv3x3_sm90_cuda.h"

namespace vgg_fast::cuda {

// The bits of a program's entries, as in vgg_fast.reference.Step.
constexpr int64_t kRelu = 1, kPool = 2, kTap = 4;

enum class Kernel { kPlain, kTensorCores, kHopper };

struct Layer {
  Conv3x3Args args;  // without x and out
  int64_t step;      // bits
  Kernel kernel;
  MmaPlan plan;     // for kTensorCores
  Sm90Plan hopper;  // for kHopper
  bool in_next;     // computed by the launch of the next layer, see fuse_first_block()
  bool with_previous;

  bool pool() const { return step & kPool; }
  bool tap() const { return step & kTap; }
  int64_t partial_bytes() const { return kernel == Kernel::kHopper ? hopper.partial_bytes : plan.partial_bytes; }
  int64_t counter_bytes() const { return kernel == Kernel::kHopper ? hopper.counter_bytes : plan.counter_bytes; }
  int64_t out_h() const { return pool() ? args.h / 2 : args.h; }
  int64_t out_w() const { return pool() ? args.w / 2 : args.w; }
};

// Checks one layer on an input of [n, cin, h, w] of the dtype and device of x, and chooses its kernel: the first of
// Hopper's, that of any tensor cores, and the plain one that serves.
//
// aligned: whether the input begins at a multiple of 16 bytes.
// weight: [cout, 3, 3, cin] contiguous, the dtype of x; affine: fp32 [2, cout] contiguous.
Layer plan_layer(const torch::stable::Tensor& x, bool aligned, int64_t cin, int64_t h, int64_t w,
                 const torch::stable::Tensor& weight, const torch::stable::Tensor& affine, int64_t step, bool tf32,
                 DeviceLimits limits);

// Makes one launch of the first two layers of a chain where that is possible (block1_cuda.h). aligned: as above.
void fuse_first_block(std::vector<Layer>& layers, bool aligned);

// Queues the first two layers after that. x: [n, h, w, cin]; full and pooled: of the second, as in launch_layer.
void launch_first_block(const Layer& first, const Layer& second, const void* x, void* full, void* pooled, Queue queue);

// Queues it. x: [n, h, w, cin]; full: [n, h, w, cout], the tap or the result without pool, or null; pooled: null
// without pool; partial and arrived: partial_bytes(), and counter_bytes() of zeros.
void launch_layer(const Layer& layer, const void* x, void* full, void* pooled, void* partial, void* arrived,
                  DeviceLimits limits, Queue queue);

}  // namespace vgg_fast::cuda
