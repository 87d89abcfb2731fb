// A chain of convolutions: everything is checked and cut first, then one workspace, then the launches on one stream.
// Nothing waits for the device and nothing is allocated by CUDA itself: the chain can be captured in a CUDA graph.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "torch_device.h"
#include "torch_layer.h"
#include "torch_ops.h"

namespace vgg_fast::cuda {
namespace {

int64_t rounded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Offsets into the workspace: partial sums and counters that the layers use one after the other, and two maps that
// they read and write in turn.
struct Workspace {
  int64_t partial = 0, counters = 0, map = 0;  // bytes of each

  int64_t counters_at() const { return partial; }
  int64_t map_at(size_t layer) const { return partial + counters + (layer % 2) * map; }
  int64_t bytes() const { return partial + counters + 2 * map; }
};

Workspace workspace_of(const std::vector<Layer>& layers) {
  Workspace w;
  for (const Layer& layer : layers) {
    w.partial = std::max(w.partial, rounded(layer.partial_bytes()));
    w.counters = std::max(w.counters, rounded(layer.counter_bytes()));
    const bool in_workspace = &layer != &layers.back() && !layer.in_next && (layer.pool() || !layer.tap());
    const int64_t pixels = layer.args.n * layer.out_h() * layer.out_w();
    if (in_workspace) w.map = std::max(w.map, rounded(pixels * layer.args.cout * element_size(layer.args.dtype)));
  }
  return w;
}

Tensor empty_map(const Tensor& x, const Layer& layer, int64_t h, int64_t w) {
  return torch::stable::empty({layer.args.n, layer.args.cout, h, w}, x.scalar_type(), std::nullopt, x.device(),
                              std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace

std::vector<Tensor> conv_stack_taps(const Tensor& any_x, const std::vector<Tensor>& weights,
                                    const std::vector<Tensor>& affines, const std::vector<int64_t>& program,
                                    const std::string& kernel) {
  const Family family = family_named(kernel);
  STD_TORCH_CHECK(weights.size() == program.size() && affines.size() == program.size(),
                  "conv_stack (cuda): ", weights.size(), " weights, ", affines.size(), " affines and ", program.size(),
                  " program entries; there must be as many of each");
  STD_TORCH_CHECK(!program.empty(), "conv_stack (cuda): the program is empty; an op must not return its input");
  STD_TORCH_CHECK(any_x.dim() == 4, "conv3x3 (cuda): x has sizes ", describe_sizes(any_x), "; expected [N, Cin, H, W]");
  const DeviceScope scope(any_x);
  const Queue queue = scope.queue();
  const DeviceLimits limits = device_limits(queue.device);
  const Tensor x = torch::stable::contiguous(any_x, torch::headeronly::MemoryFormat::ChannelsLast);
  bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  std::vector<Layer> layers;
  int64_t cin = any_x.size(1), h = any_x.size(2), w = any_x.size(3);
  for (size_t i = 0; i < program.size(); ++i) {
    layers.push_back(plan_layer(x, aligned, cin, h, w, weights[i], affines[i], program[i], family, limits));
    aligned = true;  // what is allocated here is
    cin = layers.back().args.cout;
    h = layers.back().out_h();
    w = layers.back().out_w();
  }
  fuse_first_block(layers);

  const Workspace plan = workspace_of(layers);
  Tensor workspace =
      torch::stable::empty({plan.bytes()}, torch::headeronly::ScalarType::Byte, std::nullopt, x.device());
  char* memory = static_cast<char*>(workspace.mutable_data_ptr());
  if (plan.counters) {  // every launch leaves them as zeros for the next one
    Tensor counters = torch::stable::narrow(workspace, 0, plan.counters_at(), plan.counters);
    torch::stable::zero_(counters);
  }

  std::vector<Tensor> results;
  const void* from = x.const_data_ptr();
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    if (layer.in_next) continue;
    const bool last = i + 1 == layers.size();
    void* full = nullptr;
    void* to = memory + plan.map_at(i);
    if (layer.tap()) {
      results.push_back(empty_map(x, layer, layer.args.h, layer.args.w));
      full = results.back().mutable_data_ptr();
      if (!layer.pool()) to = full;
    }
    if (last && (layer.pool() || !layer.tap())) {
      results.push_back(empty_map(x, layer, layer.out_h(), layer.out_w()));
      to = results.back().mutable_data_ptr();
    }
    if (!layer.pool()) full = to;
    void* pooled = layer.pool() ? to : nullptr;
    if (layer.with_previous)
      launch_first_block(layers[i - 1], layer, from, full, pooled, queue);
    else
      launch_layer(layer, from, full, pooled, memory, memory + plan.counters_at(), limits, queue);
    // An operator may not return one tensor twice.
    if (last && layer.tap() && !layer.pool()) results.push_back(torch::stable::clone(results.back()));
    from = to;
  }
  return results;
}

Tensor conv_stack(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& affines,
                  const std::vector<int64_t>& program, const std::string& kernel) {
  for (int64_t step : program)
    STD_TORCH_CHECK(!(step & kTap),
                    "conv_stack (cuda): a program with taps returns several tensors: ", "call conv_stack_taps");
  return conv_stack_taps(x, weights, affines, program, kernel).back();
}

Tensor conv3x3(const Tensor& x, const Tensor& weight, const Tensor& affine, bool relu, bool pool,
               const std::string& kernel) {
  return conv_stack(x, {weight}, {affine}, {(relu ? kRelu : 0) | (pool ? kPool : 0)}, kernel);
}

}  // namespace vgg_fast::cuda
