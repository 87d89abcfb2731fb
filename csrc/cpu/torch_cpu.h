// Prototypes of the CPU implementations of the ops, and what the Torch-facing files share. See vgg_fast/ops
// for the schemas.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "layout.h"
#include "microkernels.h"

namespace vgg_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor conv3x3_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool relu, bool pool,
                   const std::string& kernel);
Tensor maxpool2x2_cpu(const Tensor& x);
std::tuple<Tensor, Tensor> pack_cpu(const Tensor& weight, const std::optional<Tensor>& bias,
                                    const std::optional<Tensor>& bn_mean, const std::optional<Tensor>& bn_var,
                                    const std::optional<Tensor>& bn_weight, const std::optional<Tensor>& bn_bias,
                                    double bn_eps, const std::string& kernel);
Tensor conv_stack_cpu(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& affines,
                      const std::vector<int64_t>& program, const std::string& kernel, bool channels_last);
Tensor pack_transposed_cpu(const Tensor& weight, const std::string& kernel);
Tensor bn_relu_pool_cpu(const Tensor& z, const Tensor& affine, bool relu, bool pool);
Tensor batch_moments_cpu(const Tensor& z);
Tensor bn_relu_pool_sums_cpu(const Tensor& dy, const Tensor& z, const Tensor& affine, const Tensor& mean, bool relu,
                             bool pool);
Tensor bn_relu_pool_backward_cpu(const Tensor& dy, const Tensor& z, const Tensor& affine, const Tensor& factor,
                                 const std::optional<Tensor>& centre, bool relu, bool pool);
std::tuple<Tensor, Tensor> batch_norm_forward_cpu(const Tensor& z, const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
                                                  const std::optional<Tensor>& variance, double eps, bool relu,
                                                  bool pool);
std::tuple<Tensor, Tensor> batch_norm_backward_cpu(const Tensor& dy, const Tensor& z, const Tensor& state, bool batch,
                                                   bool relu, bool pool);
Tensor conv3x3_input_grad_cpu(const Tensor& dy, const Tensor& weight, const std::string& kernel, bool channels_last);
std::string cpu_passes();
Tensor conv3x3_weight_grad_cpu(const Tensor& x, const Tensor& dy, const Tensor& weight, const std::string& kernel);
std::string cpu_weight_grad(const std::string& kernel, const std::string& dtype, int64_t n, int64_t cin, int64_t cout,
                            int64_t h, int64_t w);
Tensor linear_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool relu,
                  const std::string& kernel);
Tensor linear_pack_cpu(const Tensor& weight, const std::string& kernel);
// The same with taps: those of the layers that have one, in order, and the last layer's result.
std::vector<Tensor> conv_stack_taps_cpu(const Tensor& x, const std::vector<Tensor>& weights,
                                        const std::vector<Tensor>& affines, const std::vector<int64_t>& program,
                                        const std::string& kernel, bool channels_last);
// The same with masks, of the steps that have one, and the gradient that goes through them.
std::vector<Tensor> conv_stack_masks_cpu(const Tensor& x, const std::vector<Tensor>& weights,
                                         const std::vector<Tensor>& affines, const std::vector<int64_t>& program,
                                         const std::string& kernel, bool channels_last);
Tensor conv_stack_backward_cpu(const Tensor& dy, const std::vector<Tensor>& weights, const std::vector<Tensor>& factors,
                               const std::vector<Tensor>& masks, const std::vector<int64_t>& program,
                               const std::vector<int64_t>& size, const std::string& kernel, bool channels_last);
// dy of maps [n][c] through their masks, times the factors: [n, c, gate.h, gate.w] in channels_last.
Tensor gradient_through_gate(const Tensor& dy, const Gate& gate, const float* factors);
int64_t fingerprint_cpu(const std::vector<Tensor>& tensors);

// PyTorch's name of a type, for error messages.
const char* name_of(ScalarType type);

// The dtype, or an error that names `what` and the dtypes there are.
DType dtype_of(const Tensor& tensor, const char* what);

// The vector [n] of any of these dtypes (or float64) in float64; `otherwise` where there is none.
std::vector<double> read_vector(const std::optional<Tensor>& tensor, int64_t n, double otherwise, const char* what);

// The transposed pack in memory of this thread, until the next call.
const uint32_t* pack_transposed_kept(const Tensor& weight, const MicroKernel& kernel);

// PyTorch's Tensor::suggest_memory_format() == ChannelsLast, read off the strides.
bool suggests_channels_last(const Tensor& tensor);

// Raises an error that names `what` unless the tensor is [N, C, H, W] on the CPU and dense in channels_last.
void check_map(const Tensor& tensor, const char* what);

// An uninitialised [n, c, h, w] tensor like `like`.
Tensor empty_image(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last);

// One image of a 4-D tensor.
Image image_of(const Tensor& tensor, DType dtype, int64_t n);

}  // namespace vgg_fast
