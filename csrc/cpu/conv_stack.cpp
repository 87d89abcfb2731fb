// A chain of convolutions in one call. Between the layers the activations stay in the blocked layout of
// conv3x3.h, in two buffers that take turns; only the first layer reads PyTorch's layout and only the last
// one writes it.
#include <algorithm>
#include <cstdint>
#include <utility>

#include "denormals.h"
#include "torch_cpu.h"
#include "winograd.h"

namespace vgg_fast {
namespace {

enum Step : int64_t { kRelu = 1, kPool = 2 };  // vgg_fast.reference.Step

struct Layer {
  const uint32_t* weight;
  const float* affine;  // [2][cout]
  int64_t cin, cout, h, w;
  bool relu, pool;

  int64_t out_h() const { return pool ? h / 2 : h; }
  int64_t out_w() const { return pool ? w / 2 : w; }
};

struct Stack {
  const MicroKernel& kernel;
  DType dtype;  // of the tensors, and the precision of every layer's result
  std::vector<Layer> layers;
  bool direct;  // the last layer writes the result itself
  int64_t threads;

  int64_t lanes(const Layer& layer) const { return kernel.groups(layer.cout) * kernel.group; }
  int64_t stored_planes(const Layer& layer) const { return ceil_div(lanes(layer), kernel.block()) * kernel.parts; }
  // Whether layer i leaves an image [h][w][lanes] behind instead of the next layer's map: the last one does where it
  // cannot write the result itself, and one before a layer that wants neighbourhoods.
  bool leaves_image(size_t i) const { return i + 1 == layers.size() ? !direct : kernel.gathers(layers[i + 1].cin); }
  Image image_after(const Layer& layer, char* data) const {
    const int64_t channels = lanes(layer);
    return {data, dtype, channels, layer.out_h(), layer.out_w(), 1, layer.out_w() * channels, channels};
  }
  // Bytes of the two buffers that `run` works in: maps take turns, an image passes through the other buffer.
  std::pair<int64_t, int64_t> buffer_sizes() const {
    int64_t in = map_bytes(kernel.cin_blocks(layers[0].cin) * kernel.parts, layers[0].h, layers[0].w), out = 0;
    bool swapped = false;
    for (size_t i = 0; i < layers.size(); ++i) {
      const Layer& layer = layers[i];
      const int64_t h = layer.out_h(), w = layer.out_w();
      if (leaves_image(i)) {
        out = std::max(out, ceil_div(h * w * lanes(layer) * element_size(dtype), kLine) * kLine);
        if (i + 1 < layers.size()) in = std::max(in, map_bytes(kernel.parts, h, w));
      } else if (i + 1 < layers.size()) {
        out = std::max(out, map_bytes(stored_planes(layer), h, w));
        std::swap(in, out);
        swapped = !swapped;
      }
    }
    return swapped ? std::pair{out, in} : std::pair{in, out};
  }

  bool winograd(const Layer& layer) const {
    return kernel.winograd_run != nullptr && winograd_pays(layer.h, layer.w, layer.cin);
  }
  WinogradPlan plan(const Layer& layer) const {
    return winograd_plan(layer.h, layer.w, kernel.cin_blocks(layer.cin), kernel.groups(layer.cout), kernel.group,
                         threads);
  }
  // What the threads share within a layer, behind the two buffers.
  int64_t shared_size() const {
    int64_t size = 0;
    for (const Layer& layer : layers) {
      if (winograd(layer)) size = std::max(size, plan(layer).shared_floats() * int64_t{sizeof(float)});
    }
    return size;
  }

  void fill(const Image& x, char* map) const;
  void run(const Image& x, const Image& y, char* in, char* out, char* shared,
           const std::vector<std::vector<float>>& affines) const;
  void run_layer(const Layer& layer, const char* in, char* out, char* shared, const Image* y,
                 const std::vector<float>& affine) const;
  void run_winograd(const Conv3x3Args& args, WinogradPlan plan, float* shared) const;
};

// A thread's accumulators. Kept between calls, as PyTorch's own CPU allocator caches nothing.
float* scratch(int64_t floats) {
  constexpr int64_t kAlign = kLine / sizeof(float);
  thread_local std::vector<float> buffer;
  if (int64_t(buffer.size()) < floats + kAlign) buffer.resize(floats + kAlign);
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return reinterpret_cast<float*>((address + kLine - 1) / kLine * kLine);
}

void Stack::run_winograd(const Conv3x3Args& args, WinogradPlan plan, float* shared) const {
  for (plan.band = 0; plan.band < plan.bands(); ++plan.band) {
    torch::stable::parallel_for(0, plan.prepare_units(), 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals mode;
      for (int64_t unit = begin; unit < end; ++unit) kernel.winograd_prepare(args, plan, unit, shared);
    });
    torch::stable::parallel_for(0, plan.run_units(), 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals mode;
      float* own = scratch(plan.scratch_floats());
      for (int64_t unit = begin; unit < end; ++unit) kernel.winograd_run(args, plan, unit, shared, own);
    });
  }
}

void Stack::run_layer(const Layer& layer, const char* in, char* out, char* shared, const Image* y,
                      const std::vector<float>& affine) const {
  const int64_t groups = kernel.groups(layer.cout), padded = lanes(layer), block = kernel.block();
  Conv3x3Args args{};
  args.x = in;
  args.weight = layer.weight;
  args.scale = affine.data();
  args.shift = affine.data() + padded;
  args.h = layer.h;
  args.w = layer.w;
  args.cin_blocks = kernel.cin_blocks(layer.cin);
  args.taps = kernel.taps(layer.cin);
  const int64_t channels = args.taps == 1 ? kTaps * layer.cin : layer.cin;
  args.last_words = ceil_div(channels - (args.cin_blocks - 1) * block, block / kWords);
  args.cout = layer.cout;
  args.relu = layer.relu;
  args.pool = layer.pool;
  args.round_to = dtype;
  if (y != nullptr) {
    const int64_t size = element_size(y->dtype);
    args.y = y->data;
    args.y_pixel = y->stride_w * size;
    args.y_row = y->stride_h * size;
    args.y_group = kernel.group * size;
    args.y_vector = kVector * size;
    args.cout_stored = y->c;
    args.store_as = y->dtype;
  } else {
    const int64_t pitch = (layer.out_w() + 2) * kLine, plane = (layer.out_h() + 2) * pitch;
    args.y = out + pitch + kLine;
    args.y_pixel = kLine;
    args.y_row = pitch;
    args.y_group = kernel.group / block * kernel.parts * plane;
    args.y_part = kernel.parts > 1 ? plane : 0;
    args.y_vector = block == kVector ? plane : kVector * element_size(kernel.compute);
    args.cout_stored = padded;
    args.store_as = kernel.compute;
    torch::stable::parallel_for(0, stored_planes(layer), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) clear_border(out, p, layer.out_h(), layer.out_w());
    });
  }
  if (winograd(layer)) return run_winograd(args, plan(layer), reinterpret_cast<float*>(shared));
  // The pool drops an odd last row; its convolution need not be computed.
  const int64_t rows = layer.pool ? layer.h / 2 * 2 : layer.h, chunks = ceil_div(rows, kernel.rows);
  // Groups outside: a group's weights stay in L2 while the rows pass by.
  torch::stable::parallel_for(0, groups * chunks, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals mode;
    float* accumulators = scratch(kernel.scratch_floats(layer.w));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit % chunks * kernel.rows;
      kernel.run(args, unit / chunks, row, std::min(row + kernel.rows, rows), accumulators);
    }
  });
}

// The first map, or any layer's that wants neighbourhoods, from an image.
void Stack::fill(const Image& x, char* map) const {
  const bool gathered = kernel.gathers(x.c);
  torch::stable::parallel_for(0, gathered ? x.h : x.h + 2, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals mode;  // the parts that a map of sums is split into may be denormal
    if (gathered) return gather_rows(x, kernel, map, begin, end);
    for (int64_t row = begin; row < end; ++row) pack_row(x, kernel, map, row);
  });
}

void Stack::run(const Image& x, const Image& y, char* in, char* out, char* shared,
                const std::vector<std::vector<float>>& affines) const {
  fill(x, in);
  for (size_t i = 0; i < layers.size(); ++i) {
    const bool last = i + 1 == layers.size();
    if (!leaves_image(i)) {
      run_layer(layers[i], in, out, shared, last ? &y : nullptr, affines[i]);
      std::swap(in, out);
      continue;
    }
    Image result = image_after(layers[i], out);
    run_layer(layers[i], in, nullptr, shared, &result, affines[i]);
    if (!last) {
      result.c = layers[i].cout;
      fill(result, in);
      continue;
    }
    torch::stable::parallel_for(0, y.h, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) copy_row(result, y, row);
    });
  }
}

}  // namespace

Tensor conv_stack_cpu(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& affines,
                      const std::vector<int64_t>& program, const std::string& kernel_name, bool channels_last) {
  STD_TORCH_CHECK(x.dim() == 4, "conv_stack: x must be [N, C, H, W], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(!program.empty() && weights.size() == program.size() && affines.size() == program.size(),
                  "conv_stack: ", weights.size(), " weights and ", affines.size(), " affines for a program of ",
                  program.size(), " steps; it needs one of each per step, and at least one");
  const DType dtype = dtype_of(x, "conv_stack: x");
  const MicroKernel& kernel = find_microkernel(kernel_name, dtype, Precision::highest, cpu_flags());
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  Stack stack{kernel, dtype, {}, false, threads};
  std::vector<std::vector<float>> padded;  // per layer: scale, shift, with zeros for the lanes past Cout
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
    const int64_t words = kernel.weight_words(layer.cout, layer.cin);
    STD_TORCH_CHECK(
        weight.scalar_type() == ScalarType::Int && weight.numel() == words && weight.is_contiguous() && weight.is_cpu(),
        "conv_stack: weight ", i, " is not what pack(..., '", kernel.name, "') returns for ", layer.cin, " -> ",
        layer.cout, " channels: ", weight.numel(), " words instead of ", words);
    STD_TORCH_CHECK(!layer.pool || (h >= 2 && w >= 2), "conv_stack: a ", h, "x", w,
                    " map cannot be pooled 2x2: Output size is too small");
    layer.weight = static_cast<const uint32_t*>(weight.const_data_ptr());
    layer.affine = static_cast<const float*>(affine.const_data_ptr());
    const int64_t lanes = kernel.groups(layer.cout) * kernel.group;
    std::vector<float>& vectors = padded.emplace_back(2 * lanes, 0.0f);
    std::copy_n(layer.affine, layer.cout, vectors.begin());
    std::copy_n(layer.affine + layer.cout, layer.cout, vectors.begin() + lanes);
    h = layer.out_h();
    w = layer.out_w();
    channels = layer.cout;
    stack.layers.push_back(layer);
  }
  stack.direct = channels_last && channels % kVector == 0;
  Tensor y = empty_image(x, x.size(0), channels, h, w, channels_last);
  const int64_t n = x.size(0);
  if (n == 0) return y;
  // As many images at a time as there are threads, each thread on its own: no waiting between layers. What is
  // left over is shared out layer by layer; parallel_for runs serially inside itself.
  const int64_t alone = n / threads * threads;
  const auto [first, second] = stack.buffer_sizes();
  const int64_t buffers = first + second, slot_bytes = buffers + stack.shared_size();
  const int64_t first_bytes = first;
  const Tensor workspace =
      torch::stable::empty({(alone ? threads : 1) * slot_bytes + kLine}, ScalarType::Byte, std::nullopt, x.device());
  const auto address = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr());
  char* base = reinterpret_cast<char*>((address + kLine - 1) / kLine * kLine);
  auto run_image = [&](int64_t image, int64_t slot) {
    char* buffer = base + slot * slot_bytes;
    stack.run(image_of(x, dtype, image), image_of(y, dtype, image), buffer, buffer + first_bytes, buffer + buffers,
              padded);
  };
  torch::stable::parallel_for(0, alone ? threads : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t image = slot; image < alone; image += threads) run_image(image, slot);
    }
  });
  for (int64_t image = alone; image < n; ++image) run_image(image, 0);
  return y;
}

}  // namespace vgg_fast
