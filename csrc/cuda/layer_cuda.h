// One convolution of a chain: which kernel runs it, cut how, with what memory; decided before anything is launched and
// by sizes alone, so that any machine can print what any GPU would do. No torch, no CUDA headers.
#pragma once

#include <cstdint>
#include <vector>

#include "conv3x3_cuda.h"
#include "conv3x3_mma_cuda.h"
#include "conv3x3_sm90_cuda.h"

namespace vgg_fast::cuda {

// The bits of a program's entries, as in vgg_fast.reference.Step.
constexpr int64_t kRelu = 1, kPool = 2, kTap = 4;

// What a caller asks for, by the names of vgg_fast.selection: mma.sync for 16-bit tensors (`cuda`), for fp32 ones as
// well (`cuda_tf32`), and either with Hopper's kernel before it (`cuda_wgmma`, `cuda_wgmma_tf32`). Where none of these
// serves a layer, the plain kernel.
enum class Family { kCuda, kCudaTf32, kCudaWgmma, kCudaWgmmaTf32 };

enum class Kernel { kPlain, kTensorCores, kHopper };

struct Layer {
  Conv3x3Args args;  // without x and out
  int64_t step;      // bits
  bool aligned;      // whether its input and its weight begin at multiples of 16 bytes
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

// Sets the kernel of a layer whose args, step and alignment are there, and its plan.
void choose_kernel(Layer& layer, Family family, DeviceLimits limits);

// Makes one launch of the first two layers of a chain where that is possible (block1_cuda.h).
void fuse_first_block(std::vector<Layer>& layers);

}  // namespace vgg_fast::cuda
