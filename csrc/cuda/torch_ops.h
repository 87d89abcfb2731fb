// The CUDA ops on tensors: what the bindings register. Every tensor lives on one device, that of x.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "launch_cuda.h"

namespace vgg_fast::cuda {

using torch::stable::Tensor;

// x: [N, Cin, H, W], fp32, fp16 or bf16 (channels_last; anything else is copied).
// weight: [Cout, 3, 3, Cin] contiguous, the dtype of x; affine: fp32 [2, Cout] contiguous, scale >= 0 and shift.
// kernel: cuda, cuda_tf32, cuda_wgmma or cuda_wgmma_tf32 (Family, layer_cuda.h).
// Returns channels_last [N, Cout, H, W], or [N, Cout, H / 2, W / 2] with pool.
Tensor conv3x3(const Tensor& x, const Tensor& weight, const Tensor& affine, bool relu, bool pool,
               const std::string& kernel);

// x: [N, C, H, W], fp32, fp16 or bf16 (channels_last or contiguous; anything else is copied).
// Returns [N, C, H / 2, W / 2]: channels_last where x is (and is not contiguous as well), else contiguous.
Tensor maxpool2x2(const Tensor& x);

// The gradient in x of maxpool2x2(x), where grad is that in its result; in the memory format of x. Deterministic.
Tensor maxpool2x2_backward(const Tensor& grad, const Tensor& x);

// A chain of conv3x3, at least one, on one stream; bits of program[i]: 1 = ReLU, 2 = pool after convolution i.
Tensor conv_stack(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& affines,
                  const std::vector<int64_t>& program, const std::string& kernel);

// The same with a third bit, 4 = tap: the values of convolution i before its pool are returned as well. The taps in
// order, then the result, which is a tensor of its own.
std::vector<Tensor> conv_stack_taps(const Tensor& x, const std::vector<Tensor>& weights,
                                    const std::vector<Tensor>& affines, const std::vector<int64_t>& program,
                                    const std::string& kernel);

// Whether [N, C, H, W] lies in memory as dense [N, H, W, C].
bool is_channels_last(const Tensor& t);

// "[2, 3, 4]", for error messages.
std::string describe_sizes(const Tensor& t);

// The kernels' name for the dtype of x, or an error naming what is supported.
DType kernel_dtype(const char* op, const Tensor& x);

// An error with CUDA's message, unless it is null.
void check_launch(const char* op, const char* message);

}  // namespace vgg_fast::cuda
