// A chain of convolutions in one call: checks it, and hands images and workspace to the threads. stack.cpp computes.
#include <algorithm>
#include <cstring>
#include <utility>

#include "kept_memory.h"
#include "stack.h"
#include "torch_cpu.h"

namespace vgg_fast {
namespace {

enum Step : int64_t { kRelu = 1, kPool = 2, kTap = 4 };  // vgg_fast.reference.Step

// A layer whose scale and shift are still zeros.
Layer layer_of(const Tensor& weight, size_t i, int64_t cin, int64_t cout, int64_t h, int64_t w,
               const MicroKernel& kernel) {
  Layer layer{};
  layer.cin = cin;
  layer.cout = cout;
  layer.h = h;
  layer.w = w;
  const int64_t words = kernel.weight_words(cout, cin);
  STD_TORCH_CHECK(
      weight.scalar_type() == ScalarType::Int && weight.numel() == words && weight.is_contiguous() && weight.is_cpu(),
      "conv_stack: weight ", i, " is not what pack(..., '", kernel.name, "') returns for ", cin, " -> ", cout,
      " channels: ", weight.numel(), " words instead of ", words);
  layer.weight = static_cast<const uint32_t*>(weight.const_data_ptr());
  layer.affine.assign(2 * kernel.groups(cout) * kernel.group, 0.0f);
  return layer;
}

const float* factor_of(const Tensor& factor, int64_t channels) {
  STD_TORCH_CHECK(factor.scalar_type() == ScalarType::Float && factor.numel() == channels && factor.is_contiguous() &&
                      factor.is_cpu(),
                  "conv_stack_backward: a factor must be a contiguous fp32 CPU tensor of ", channels, " elements");
  return static_cast<const float*>(factor.const_data_ptr());
}

std::vector<Layer> layers_of(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& affines,
                             const std::vector<int64_t>& program, const MicroKernel& kernel) {
  std::vector<Layer> layers;
  int64_t channels = x.size(1), h = x.size(2), w = x.size(3);
  STD_TORCH_CHECK(channels > 0 && h > 0 && w > 0, "conv_stack: x has no channels or no pixels: [", x.size(0), ", ",
                  channels, ", ", h, ", ", w, "]");
  for (size_t i = 0; i < program.size(); ++i) {
    const Tensor& affine = affines[i];
    STD_TORCH_CHECK(affine.dim() == 2 && affine.size(0) == 2 && affine.scalar_type() == ScalarType::Float &&
                        affine.is_contiguous() && affine.is_cpu(),
                    "conv_stack: affine ", i, " must be a contiguous fp32 CPU tensor [2, Cout] as pack returns it");
    Layer layer = layer_of(weights[i], i, channels, affine.size(1), h, w, kernel);
    const float* vectors = static_cast<const float*>(affine.const_data_ptr());
    std::copy_n(vectors, layer.cout, layer.affine.begin());
    std::copy_n(vectors + layer.cout, layer.cout, layer.affine.begin() + layer.affine.size() / 2);
    layer.relu = program[i] & kRelu;
    layer.pool = program[i] & kPool;
    layer.tap = program[i] & kTap;
    STD_TORCH_CHECK(!layer.pool || (h >= 2 && w >= 2), "conv_stack: a ", h, "x", w,
                    " map cannot be pooled 2x2: Output size is too small");
    h = layer.out_h();
    w = layer.out_w();
    channels = layer.cout;
    layers.push_back(std::move(layer));
  }
  return layers;
}

// Images that are run together where the weights take longer to arrive than an image to compute, and what their
// workspaces may take.
constexpr int64_t kTogether = 32, kTogetherBytes = 1 << 25;

// How a batch is run.
class Batch {
 public:
  Batch(const Stack& stack, int64_t n, int64_t threads)
      : stack_(stack), n_(n), threads_(threads), deep_(n > 1 ? stack.lockstep_begin() : stack.size()) {
    slots_ = n >= threads ? threads : 1;
    if (!together()) return;
    const int64_t fit = std::clamp<int64_t>(kTogetherBytes / stack.workspace_bytes(), 2, kTogether);
    slots_ = ceil_div(n, ceil_div(n, fit));
  }

  int64_t workspace_bytes() const {
    return slots_ * stack_.workspace_bytes() + (together() ? stack_.shared_bytes(slots_) : 0) + kLine;
  }

  // task_of(image): where its chain begins and ends.
  template <class TaskOf>
  void run(char* workspace, const TaskOf& task_of) const {
    char* base = next_line(workspace);
    const auto task = [&](int64_t image, int64_t slot) {
      Task one = task_of(image);
      one.workspace = base + slot * stack_.workspace_bytes();
      return one;
    };
    // As many images at a time as there are threads, each thread on its own: no waiting between layers. What is left
    // over is shared out layer by layer; parallel_for runs serially inside itself.
    const auto run_alone = [&](int64_t first, int64_t count, size_t layers) {
      const int64_t alone = count / threads_ * threads_;
      torch::stable::parallel_for(0, alone ? threads_ : 0, 1, [&](int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) {
          for (int64_t i = thread; i < alone; i += threads_) {
            stack_.run({task(first + i, together() ? i : thread)}, 0, layers, nullptr);
          }
        }
      });
      for (int64_t i = alone; i < count; ++i) {
        stack_.run({task(first + i, together() ? i : 0)}, 0, layers, nullptr);
      }
    };
    if (!together()) return run_alone(0, n_, stack_.size());
    for (int64_t first = 0; first < n_; first += slots_) {
      const int64_t count = std::min(slots_, n_ - first);
      run_alone(first, count, deep_);
      std::vector<Task> tasks;
      for (int64_t i = 0; i < count; ++i) tasks.push_back(task(first + i, i));
      stack_.run(tasks, deep_, stack_.size(), base + slots_ * stack_.workspace_bytes());
    }
  }

 private:
  bool together() const { return deep_ < stack_.size(); }

  const Stack& stack_;
  int64_t n_, threads_, slots_;
  size_t deep_;
};

// [n][ceil(c / 16)][h][w][2] bytes. What no window of the pool holds is never written, but read by who unpacks it.
Tensor empty_mask(const Tensor& like, int64_t n, const Layer& layer) {
  const Tensor mask = torch::stable::empty({n, ceil_div(layer.cout, kVector), layer.h, layer.w, 2}, ScalarType::Byte,
                                           std::nullopt, like.device());
  if (layer.pool && (layer.h % 2 || layer.w % 2)) {
    std::memset(mask.mutable_data_ptr(), 0, n * mask_bytes(layer.cout, layer.h, layer.w));
  }
  return mask;
}

char* mask_of(const Tensor& masks, int64_t image) {
  const char* data = static_cast<const char*>(masks.const_data_ptr());
  return const_cast<char*>(data) + image * masks.size(1) * masks.size(2) * masks.size(3) * masks.size(4);
}

// The chain forward: its taps or its masks, in order, then the result.
std::vector<Tensor> run_chain(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& affines,
                              const std::vector<int64_t>& program, const std::string& kernel_name, bool channels_last,
                              bool with_masks) {
  STD_TORCH_CHECK(x.dim() == 4, "conv_stack: x must be [N, C, H, W], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(!program.empty() && weights.size() == program.size() && affines.size() == program.size(),
                  "conv_stack: ", weights.size(), " weights and ", affines.size(), " affines for a program of ",
                  program.size(), " steps; it needs one of each per step, and at least one");
  const DType dtype = dtype_of(x, "conv_stack: x");
  const MicroKernel& kernel = find_microkernel(kernel_name, dtype, Precision::highest, cpu_flags());
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  std::vector<Layer> layers = layers_of(x, weights, affines, program, kernel);
  const int64_t n = x.size(0);
  std::vector<Tensor> results, masks;
  std::vector<int64_t> mask_of_layer(layers.size(), -1);
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    if (layer.tap) results.push_back(empty_image(x, n, layer.cout, layer.h, layer.w, channels_last));
    if (!with_masks || !(layer.relu || layer.pool)) continue;
    mask_of_layer[i] = int64_t(masks.size());
    masks.push_back(empty_mask(x, n, layer));
  }
  const Layer& last = layers.back();
  results.push_back(empty_image(x, n, last.cout, last.out_h(), last.out_w(), channels_last));
  if (n > 0) {
    const Stack stack(kernel, dtype, std::move(layers), channels_last, threads);
    const Batch batch(stack, n, threads);
    const Tensor workspace =
        torch::stable::empty({batch.workspace_bytes()}, ScalarType::Byte, std::nullopt, x.device());
    batch.run(static_cast<char*>(workspace.mutable_data_ptr()), [&](int64_t image) {
      Results of_image{{}, image_of(results.back(), dtype, image), {}, {}};
      for (size_t i = 0; i + 1 < results.size(); ++i) of_image.taps.push_back(image_of(results[i], dtype, image));
      for (const int64_t mask : mask_of_layer) {
        of_image.masks.push_back(mask < 0 ? nullptr : mask_of(masks[mask], image));
      }
      return Task{image_of(x, dtype, image), std::move(of_image), nullptr};
    });
  }
  masks.insert(masks.end(), results.begin(), results.end());
  return masks;
}

}  // namespace

std::vector<Tensor> conv_stack_taps_cpu(const Tensor& x, const std::vector<Tensor>& weights,
                                        const std::vector<Tensor>& affines, const std::vector<int64_t>& program,
                                        const std::string& kernel, bool channels_last) {
  return run_chain(x, weights, affines, program, kernel, channels_last, false);
}

std::vector<Tensor> conv_stack_masks_cpu(const Tensor& x, const std::vector<Tensor>& weights,
                                         const std::vector<Tensor>& affines, const std::vector<int64_t>& program,
                                         const std::string& kernel, bool channels_last) {
  for (const int64_t step : program) {
    STD_TORCH_CHECK(!(step & kTap), "conv_stack_masks takes a program without taps (bit ", int64_t{kTap}, "), got ",
                    step);
  }
  return run_chain(x, weights, affines, program, kernel, channels_last, true);
}

Tensor conv_stack_cpu(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& affines,
                      const std::vector<int64_t>& program, const std::string& kernel, bool channels_last) {
  for (const int64_t step : program) {
    STD_TORCH_CHECK(!(step & kTap), "conv_stack: a program with taps returns several tensors: call conv_stack_taps");
  }
  return run_chain(x, weights, affines, program, kernel, channels_last, false).back();
}

// The same chain from its end, with transposed weights. What stands between two of its convolutions is what stood
// between those of the chain: the mask and the factor of the lower one. Those of the last step come first.
Tensor conv_stack_backward_cpu(const Tensor& dy, const std::vector<Tensor>& weights, const std::vector<Tensor>& factors,
                               const std::vector<Tensor>& masks, const std::vector<int64_t>& program,
                               const std::vector<int64_t>& size, const std::string& kernel_name, bool channels_last) {
  const size_t steps = program.size();
  STD_TORCH_CHECK(steps > 0 && weights.size() == steps && factors.size() == steps && size.size() == 4,
                  "conv_stack_backward: ", weights.size(), " weights, ", factors.size(), " factors and ", size.size(),
                  " sizes for a program of ", steps, " steps; it needs one of each per step, and the four sizes of x");
  const DType dtype = dtype_of(dy, "conv_stack_backward: dy");
  const MicroKernel& kernel = find_microkernel(kernel_name, dtype, Precision::highest, cpu_flags());
  const int64_t n = size[0], threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  std::vector<Layer> layers;
  std::vector<const Tensor*> gates;  // of every layer, that of the step below it
  Gate below{};
  const Tensor* mask = nullptr;
  auto next = masks.begin();
  int64_t channels = size[1], h = size[2], w = size[3];
  for (size_t i = 0; i < steps; ++i) {
    layers.push_back(layer_of(weights[i], i, factors[i].numel(), channels, h, w, kernel));
    Layer& layer = layers.back();
    const float* scale = i == 0 ? nullptr : factor_of(factors[i - 1], channels);
    for (int64_t c = 0; c < channels; ++c) layer.affine[c] = scale == nullptr ? 1.0f : scale[c];
    layer.below = below;
    gates.push_back(mask);
    channels = layer.cin;
    mask = nullptr;
    if (program[i] & (kRelu | kPool)) {
      STD_TORCH_CHECK(next != masks.end() && next->numel() == n * mask_bytes(channels, h, w) && next->dim() == 5 &&
                          next->scalar_type() == ScalarType::Byte && next->is_contiguous() && next->is_cpu(),
                      "conv_stack_backward: the mask of step ", i, " is not that of ", n, " maps of ", channels,
                      " channels of ", h, "x", w);
      mask = &*next++;
    }
    below = Gate{nullptr, h, w, bool(program[i] & kPool)};
    h = below.pooled ? h / 2 : h;
    w = below.pooled ? w / 2 : w;
  }
  const char* top = mask == nullptr ? nullptr : static_cast<const char*>(mask->const_data_ptr());
  below.mask = top;
  STD_TORCH_CHECK(dy.dim() == 4 && dy.size(0) == n && dy.size(1) == channels && dy.size(2) == h && dy.size(3) == w,
                  "conv_stack_backward: dy must be [", n, ", ", channels, ", ", h, ", ", w, "]");
  const Tensor dz = gradient_through_gate(dy, below, factor_of(factors.back(), channels));
  Tensor dx = empty_image(dy, n, size[1], size[2], size[3], channels_last);
  if (n == 0) return dx;
  std::reverse(layers.begin(), layers.end());
  std::reverse(gates.begin(), gates.end());
  const Stack stack(kernel, dtype, std::move(layers), channels_last, threads);
  const Batch batch(stack, n, threads);
  const Tensor workspace = torch::stable::empty({batch.workspace_bytes()}, ScalarType::Byte, std::nullopt, dy.device());
  batch.run(static_cast<char*>(workspace.mutable_data_ptr()), [&](int64_t image) {
    Results of_image{{}, image_of(dx, dtype, image), {}, {}};
    for (const Tensor* gate : gates) of_image.gates.push_back(gate == nullptr ? nullptr : mask_of(*gate, image));
    return Task{image_of(dz, dtype, image), std::move(of_image), nullptr};
  });
  return dx;
}

Tensor conv3x3_input_grad_cpu(const Tensor& dy, const Tensor& weight, const std::string& kernel_name,
                              bool channels_last) {
  const DType dtype = dtype_of(dy, "conv3x3_input_grad: dy");
  STD_TORCH_CHECK(
      dy.dim() == 4 && weight.dim() == 4 && weight.size(0) == dy.size(1) && weight.scalar_type() == dy.scalar_type(),
      "conv3x3_input_grad: dy must be [N, Cout, H, W] and weight [Cout, Cin, 3, 3] of the same dtype");
  const MicroKernel& kernel = find_microkernel(kernel_name, dtype, Precision::highest, cpu_flags());
  const int64_t n = dy.size(0), threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  Layer layer{};
  layer.weight = pack_transposed_kept(weight, kernel);
  layer.cin = weight.size(0);
  layer.cout = weight.size(1);
  layer.h = dy.size(2);
  layer.w = dy.size(3);
  const int64_t lanes = kernel.groups(layer.cout) * kernel.group;
  layer.affine.assign(2 * lanes, 0.0f);
  std::fill_n(layer.affine.begin(), layer.cout, 1.0f);
  Tensor dx = empty_image(dy, n, layer.cout, layer.h, layer.w, channels_last);
  const Stack stack(kernel, dtype, {layer}, channels_last, threads);
  const Batch batch(stack, n, threads);
  batch.run(kept(Kept::workspace, batch.workspace_bytes()), [&](int64_t image) {
    return Task{image_of(dy, dtype, image), Results{{}, image_of(dx, dtype, image), {}, {}}, nullptr};
  });
  return dx;
}

}  // namespace vgg_fast
