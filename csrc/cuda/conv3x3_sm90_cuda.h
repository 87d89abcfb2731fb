// The Hopper form of conv3x3 as other files see it: no torch, no CUDA headers.
#pragma once

#include "conv3x3_cuda.h"

namespace vgg_fast::cuda {

// Why this form does not serve a problem on a device of compute capability sm (90 for 9.0), or null where it does.
const char* conv3x3_sm90_unsupported(const Conv3x3Args& args, int sm);

// Queues the kernel; `tap`, with pool, also takes the map before the pool, [n, h, w, cout], or is null.
// Returns null, or why nothing was queued.
const char* launch_conv3x3_sm90(const Conv3x3Args& args, void* tap, Queue queue);

}  // namespace vgg_fast::cuda
