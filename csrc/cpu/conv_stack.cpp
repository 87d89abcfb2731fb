// A chain of convolutions in one call: checks it, and hands images and workspace to the threads. stack.cpp computes.
#include <algorithm>
#include <utility>

#include "stack.h"
#include "torch_cpu.h"

namespace vgg_fast {
namespace {

enum Step : int64_t { kRelu = 1, kPool = 2, kTap = 4 };  // vgg_fast.reference.Step

std::vector<Layer> layers_of(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& affines,
                             const std::vector<int64_t>& program, const MicroKernel& kernel) {
  std::vector<Layer> layers;
  int64_t channels = x.size(1), h = x.size(2), w = x.size(3);
  STD_TORCH_CHECK(channels > 0 && h > 0 && w > 0, "conv_stack: x has no channels or no pixels: [", x.size(0), ", ",
                  channels, ", ", h, ", ", w, "]");
  for (size_t i = 0; i < program.size(); ++i) {
    const Tensor &weight = weights[i], &affine = affines[i];
    STD_TORCH_CHECK(affine.dim() == 2 && affine.size(0) == 2 && affine.scalar_type() == ScalarType::Float &&
                        affine.is_contiguous() && affine.is_cpu(),
                    "conv_stack: affine ", i, " must be a contiguous fp32 CPU tensor [2, Cout] as pack returns it");
    Layer layer{};
    layer.cin = channels;
    layer.cout = affine.size(1);
    layer.h = h;
    layer.w = w;
    layer.relu = program[i] & kRelu;
    layer.pool = program[i] & kPool;
    layer.tap = program[i] & kTap;
    const int64_t words = kernel.weight_words(layer.cout, layer.cin);
    STD_TORCH_CHECK(
        weight.scalar_type() == ScalarType::Int && weight.numel() == words && weight.is_contiguous() && weight.is_cpu(),
        "conv_stack: weight ", i, " is not what pack(..., '", kernel.name, "') returns for ", layer.cin, " -> ",
        layer.cout, " channels: ", weight.numel(), " words instead of ", words);
    STD_TORCH_CHECK(!layer.pool || (h >= 2 && w >= 2), "conv_stack: a ", h, "x", w,
                    " map cannot be pooled 2x2: Output size is too small");
    layer.weight = static_cast<const uint32_t*>(weight.const_data_ptr());
    const float* vectors = static_cast<const float*>(affine.const_data_ptr());
    const int64_t lanes = kernel.groups(layer.cout) * kernel.group;
    layer.affine.assign(2 * lanes, 0.0f);
    std::copy_n(vectors, layer.cout, layer.affine.begin());
    std::copy_n(vectors + layer.cout, layer.cout, layer.affine.begin() + lanes);
    h = layer.out_h();
    w = layer.out_w();
    channels = layer.cout;
    layers.push_back(std::move(layer));
  }
  return layers;
}

}  // namespace

std::vector<Tensor> conv_stack_taps_cpu(const Tensor& x, const std::vector<Tensor>& weights,
                                        const std::vector<Tensor>& affines, const std::vector<int64_t>& program,
                                        const std::string& kernel_name, bool channels_last) {
  STD_TORCH_CHECK(x.dim() == 4, "conv_stack: x must be [N, C, H, W], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(!program.empty() && weights.size() == program.size() && affines.size() == program.size(),
                  "conv_stack: ", weights.size(), " weights and ", affines.size(), " affines for a program of ",
                  program.size(), " steps; it needs one of each per step, and at least one");
  const DType dtype = dtype_of(x, "conv_stack: x");
  const MicroKernel& kernel = find_microkernel(kernel_name, dtype, Precision::highest, cpu_flags());
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  std::vector<Layer> layers = layers_of(x, weights, affines, program, kernel);
  const int64_t n = x.size(0);
  std::vector<Tensor> results;
  for (const Layer& layer : layers) {
    if (layer.tap) results.push_back(empty_image(x, n, layer.cout, layer.h, layer.w, channels_last));
  }
  const Layer& last = layers.back();
  results.push_back(empty_image(x, n, last.cout, last.out_h(), last.out_w(), channels_last));
  if (n == 0) return results;
  const Stack stack(kernel, dtype, std::move(layers), channels_last, threads);
  // As many images at a time as there are threads, each thread on its own: no waiting between layers. What is
  // left over is shared out layer by layer; parallel_for runs serially inside itself.
  const int64_t alone = n / threads * threads, slot_bytes = stack.workspace_bytes();
  const Tensor workspace =
      torch::stable::empty({(alone ? threads : 1) * slot_bytes + kLine}, ScalarType::Byte, std::nullopt, x.device());
  const auto address = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr());
  char* base = reinterpret_cast<char*>((address + kLine - 1) / kLine * kLine);
  const auto run_image = [&](int64_t image, int64_t slot) {
    Results of_image{{}, image_of(results.back(), dtype, image)};
    for (size_t i = 0; i + 1 < results.size(); ++i) of_image.taps.push_back(image_of(results[i], dtype, image));
    stack.run(image_of(x, dtype, image), of_image, base + slot * slot_bytes);
  };
  torch::stable::parallel_for(0, alone ? threads : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t image = slot; image < alone; image += threads) run_image(image, slot);
    }
  });
  for (int64_t image = alone; image < n; ++image) run_image(image, 0);
  return results;
}

Tensor conv_stack_cpu(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& affines,
                      const std::vector<int64_t>& program, const std::string& kernel, bool channels_last) {
  for (const int64_t step : program) {
    STD_TORCH_CHECK(!(step & kTap), "conv_stack: a program with taps returns several tensors: call conv_stack_taps");
  }
  return conv_stack_taps_cpu(x, weights, affines, program, kernel, channels_last).back();
}

}  // namespace vgg_fast
