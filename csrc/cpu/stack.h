// A chain of convolutions over one image: what conv_stack.cpp checks and hands out to threads, stack.cpp computes.
// Plain C++.
#pragma once
#include <algorithm>
#include <vector>

#include "layout.h"
#include "winograd.h"

namespace vgg_fast {

struct Layer {
  const uint32_t* weight;
  std::vector<float> affine;  // scale, shift: each as long as the lanes, with zeros past Cout
  int64_t cin, cout, h, w;
  bool relu, pool, tap;
  Gate below;  // of a layer that computes a gradient: the mask's size, and whether it is spread over windows

  int64_t out_h() const { return below.pooled ? below.h : pool ? h / 2 : h; }
  int64_t out_w() const { return below.pooled ? below.w : pool ? w / 2 : w; }
};

// Where the results of a chain go: the images of the layers with a tap, in order, and that of the last layer. Masks, if
// any, are one per layer, null where there is none: those that it writes, or that its gradient goes through.
struct Results {
  std::vector<Image> taps;
  Image y;
  std::vector<char*> masks;
  std::vector<const char*> gates;
};

// One image on its way through a chain, and a workspace for it.
struct Task {
  Image x;
  Results results;
  char* workspace;
};

// A chain of transposed weights computes the gradient of one: each layer's result goes through the gate below it.
//
// Between the layers the activations stay in the blocked layout of conv3x3.h, at the two ends of one workspace; only
// the first layer reads PyTorch's layout and only results are written in it. Where the first two layers are large, the
// map between them is never there as a whole: each thread computes it strip by strip, in its own cache.
class Stack {
 public:
  // Each result of channels_last memory and a multiple of 16 channels is written directly.
  Stack(const MicroKernel& kernel, DType dtype, std::vector<Layer> layers, bool channels_last, int64_t threads);

  size_t size() const { return layers_.size(); }
  // Bytes of a task's workspace, 64-byte aligned, and of what several tasks share.
  int64_t workspace_bytes() const { return workspace_bytes_; }
  int64_t shared_bytes(int64_t tasks) const;
  // From this layer on several images had better be run together: their maps are so small that each image alone would
  // take less time to compute than its weights to arrive. size() if there is none.
  size_t lockstep_begin() const;
  // Runs layers [begin, end) of all tasks together; those before `begin` have been run. Shares the work among the
  // threads of torch::stable::parallel_for, or runs alone when called inside of one. shared: for several tasks.
  void run(const std::vector<Task>& tasks, size_t begin, size_t end, char* shared) const;

 private:
  struct Strip {
    int64_t top, bottom;           // rows
    int64_t unit_begin, unit_end;  // of the second layer's Winograd plan
  };

  struct Buffers {
    int64_t in, out, shared, staging;
  };

  int64_t lanes(const Layer& layer) const { return kernel_.groups(layer.cout) * kernel_.group; }
  int64_t planes(const Layer& layer) const { return ceil_div(lanes(layer), kernel_.block()) * kernel_.parts; }
  bool writes_directly(const Layer& layer) const { return channels_last_ && layer.cout % kVector == 0; }
  bool leaves_image(size_t i) const;
  Image staged(const Layer& layer, char* data, int64_t h, int64_t w) const;
  bool winograd(const Layer& layer) const;
  WinogradPlan plan(const Layer& layer, int64_t images = 1) const;
  bool forward_at(size_t i) const;
  int64_t weight_bytes(const Layer& layer) const { return kernel_.weight_words(layer.cout, layer.cin) * 4; }
  bool strips() const;
  Buffers buffers(size_t i) const;

  Conv3x3Args arguments(size_t i, const Results& results) const;
  Output map_output(const Layer& layer, char* map, int64_t h, int64_t w) const;
  Output image_output(const Image& image) const;
  void fill(const Image& x, char* map) const;
  size_t tap_of(size_t i) const {
    return std::count_if(layers_.begin(), layers_.begin() + i, [](const Layer& layer) { return layer.tap; });
  }
  Image tapped(const Task& task, size_t i) const;
  Conv3x3Args prepare(const Task& task, size_t i) const;
  void run_layer(const Layer& layer, const std::vector<Conv3x3Args>& images, char* shared) const;
  void finish(const Task& task, size_t i) const;
  Strip strip_of(int64_t strip, int64_t strips, int64_t rows) const;
  void run_strips(const Image& x, const Results& results, const Conv3x3Args& args, char* shared) const;
  void fill_strip(const Image& x, int64_t row_begin, int64_t row_end, char* map) const;

  const MicroKernel& kernel_;
  DType dtype_;  // of the tensors, and the precision of every layer's result
  std::vector<Layer> layers_;
  bool channels_last_;
  int64_t threads_;
  int64_t workspace_bytes_ = 0;
};

}  // namespace vgg_fast
