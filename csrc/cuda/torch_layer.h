// One convolution of a chain, from tensors to a launch.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>

#include "layer_cuda.h"

namespace vgg_fast::cuda {

// The family of this name, or an error that names those there are.
Family family_named(const std::string& name);

// Checks one layer on an input of [n, cin, h, w] of the dtype and device of x, and chooses its kernel.
//
// aligned: whether the input begins at a multiple of 16 bytes.
// weight: [cout, 3, 3, cin] contiguous, the dtype of x; affine: fp32 [2, cout] contiguous.
Layer plan_layer(const torch::stable::Tensor& x, bool aligned, int64_t cin, int64_t h, int64_t w,
                 const torch::stable::Tensor& weight, const torch::stable::Tensor& affine, int64_t step, Family family,
                 DeviceLimits limits);

// Queues the first two layers after fuse_first_block(). x: [n, h, w, cin]; full and pooled: of the second, as in
// launch_layer.
void launch_first_block(const Layer& first, const Layer& second, const void* x, void* full, void* pooled, Queue queue);

// Queues it. x: [n, h, w, cin]; full: [n, h, w, cout], the tap or the result without pool, or null; pooled: null
// without pool; partial and arrived: partial_bytes(), and counter_bytes() of zeros.
void launch_layer(const Layer& layer, const void* x, void* full, void* pooled, void* partial, void* arrived,
                  DeviceLimits limits, Queue queue);

}  // namespace vgg_fast::cuda
