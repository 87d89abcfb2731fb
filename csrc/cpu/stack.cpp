#include "stack.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "denormals.h"
#include "torch_cpu.h"

namespace vgg_fast {
namespace {

// Convolution rows of the second layer that a strip holds: a multiple of Winograd's tiles, and few enough for the maps
// of a strip of a 224-wide image (0.3 MB in bf16) to stay in L2.
constexpr int64_t kStripRows = 8;
// A map that fits into this is not worth computing strip by strip.
constexpr int64_t kSmallMap = 1 << 19;
// Two of a strip's rows of the first layer are computed for the neighbouring strip once more: that must be little of
// the second layer's work.
constexpr int64_t kStripGain = 8;
// All groups pass over a chunk of rows while it is in L2 if their weights fit in there too. Threads then share no more
// than rows at the seams: fetching the other half of a map from another core's cache costs 0.1 ms a layer.
constexpr int64_t kResidentWeights = 5 << 18;

// A thread's own memory, kept between calls: PyTorch's CPU allocator caches nothing, and fresh pages cost a fault each.
char* scratch(int64_t bytes) {
  thread_local std::vector<char> buffer;
  if (int64_t(buffer.size()) < bytes + kLine) buffer.resize(bytes + kLine);
  return next_line(buffer.data());
}

float* scratch_floats(int64_t floats) { return reinterpret_cast<float*>(scratch(floats * int64_t{sizeof(float)})); }

int64_t lines(int64_t bytes) { return ceil_div(bytes, kLine) * kLine; }

void copy_image(const Image& from, const Image& to) {
  torch::stable::parallel_for(0, to.h, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) copy_row(from, to, row);
  });
}

}  // namespace

Stack::Stack(const MicroKernel& kernel, DType dtype, std::vector<Layer> layers, bool channels_last, int64_t threads)
    : kernel_(kernel), dtype_(dtype), layers_(std::move(layers)), channels_last_(channels_last), threads_(threads) {
  for (size_t i = strips() ? 1 : 0; i < layers_.size(); ++i) {
    const Buffers b = buffers(i);
    workspace_bytes_ = std::max(workspace_bytes_, b.in + b.out + b.shared + b.staging);
    // An image that the next layer's map is made from is still there.
    if (i + 1 < layers_.size() && leaves_image(i)) {
      workspace_bytes_ = std::max(workspace_bytes_, b.out + buffers(i + 1).in);
    }
  }
}

// Whether layer i leaves an image [h][w][lanes] behind instead of the next layer's map: the last one does where it
// cannot write the result itself, and one before a layer that wants neighbourhoods.
bool Stack::leaves_image(size_t i) const {
  return i + 1 == layers_.size() ? !writes_directly(layers_[i]) : kernel_.gathers(layers_[i + 1].cin);
}

Image Stack::staged(const Layer& layer, char* data, int64_t h, int64_t w) const {
  const int64_t channels = lanes(layer);
  return {data, dtype_, channels, h, w, 1, w * channels, channels};
}

bool Stack::winograd(const Layer& layer) const {
  return kernel_.winograd_run != nullptr && winograd_pays(layer.h, layer.w, layer.cin);
}

WinogradPlan Stack::plan(const Layer& layer, int64_t images) const {
  return winograd_plan(layer.h, layer.w, kernel_.cin_blocks(layer.cin), kernel_.groups(layer.cout), kernel_.group,
                       threads_, images);
}

// Of several images the maps pass by while a group's weights are in L2, which is no gain where the maps are as large.
size_t Stack::lockstep_begin() const {
  const size_t least = strips() ? 2 : 0;
  size_t begin = layers_.size();
  for (; begin > least; --begin) {
    const Layer& layer = layers_[begin - 1];
    const int64_t map = map_bytes(kernel_.cin_blocks(layer.cin) * kernel_.parts, layer.h, layer.w);
    if (2 * map > weight_bytes(layer) / kernel_.groups(layer.cout)) break;
    if (winograd(layer) && plan(layer).share_weights) break;
  }
  return begin;
}

int64_t Stack::shared_bytes(int64_t tasks) const {
  int64_t floats = 0;
  for (size_t i = lockstep_begin(); i < layers_.size(); ++i) {
    if (winograd(layers_[i])) floats = std::max(floats, plan(layers_[i], tasks).shared_floats());
  }
  return lines(floats * int64_t{sizeof(float)});
}

bool Stack::strips() const {
  if (layers_.size() < 2 || leaves_image(0)) return false;
  const Layer &first = layers_[0], &second = layers_[1];
  if (first.tap || first.below.pooled || winograd(first) || (winograd(second) && !plan(second).share_weights))
    return false;
  const int64_t first_products = first.cin * first.cout * (first.pool ? 4 : 1);
  return kStripGain * first_products <= second.cin * second.cout &&
         map_bytes(planes(first), first.out_h(), first.out_w()) > kSmallMap;
}

// What layer i needs of the workspace: its map, what it leaves behind, what its threads share, and a tap on its way
// out.
Stack::Buffers Stack::buffers(size_t i) const {
  const Layer& layer = layers_[i];
  const int64_t pixel = lanes(layer) * element_size(dtype_), h = layer.out_h(), w = layer.out_w();
  Buffers b{};
  if (i == 0 || leaves_image(i - 1)) {
    b.in = map_bytes(kernel_.cin_blocks(layer.cin) * kernel_.parts, layer.h, layer.w);
  } else if (i > 1 || !strips()) {
    b.in = map_bytes(planes(layers_[i - 1]), layer.h, layer.w);
  }
  if (leaves_image(i)) {
    b.out = lines(h * w * pixel);
  } else if (i + 1 < layers_.size()) {
    b.out = map_bytes(planes(layer), h, w);
  }
  if (winograd(layer)) b.shared = plan(layer).shared_floats() * int64_t{sizeof(float)};
  if (layer.tap && !writes_directly(layer)) b.staging = lines(layer.h * layer.w * pixel);
  return b;
}

Conv3x3Args Stack::arguments(size_t i, const Results& results) const {
  const Layer& layer = layers_[i];
  const int64_t block = kernel_.block(), taps = kernel_.taps(layer.cin), blocks = kernel_.cin_blocks(layer.cin);
  const int64_t channels = taps == 1 ? kTaps * layer.cin : layer.cin;
  Conv3x3Args args{};
  args.weight = layer.weight;
  args.scale = layer.affine.data();
  args.shift = layer.affine.data() + lanes(layer);
  args.x_plane = (layer.h + 2) * (layer.w + 2) * kLine;
  args.h = layer.h;
  args.w = layer.w;
  args.cin_blocks = blocks;
  args.last_words = ceil_div(channels - (blocks - 1) * block, block / kWords);
  args.cout = layer.cout;
  args.taps = taps;
  args.relu = layer.relu;
  args.pool = layer.pool;
  args.round_to = dtype_;
  if (!results.masks.empty()) args.mask = results.masks[i];
  args.gate = layer.below;
  if (!results.gates.empty()) args.gate.mask = results.gates[i];
  return args;
}

Output Stack::map_output(const Layer& layer, char* map, int64_t h, int64_t w) const {
  const int64_t block = kernel_.block(), pitch = (w + 2) * kLine, plane = (h + 2) * pitch;
  Output out{};
  out.data = map + pitch + kLine;
  out.pixel = kLine;
  out.row = pitch;
  out.group = kernel_.group / block * kernel_.parts * plane;
  out.vector = block == kVector ? plane : kVector * element_size(kernel_.compute);
  out.part = kernel_.parts > 1 ? plane : 0;
  out.stored = lanes(layer);
  out.type = kernel_.compute;
  return out;
}

Output Stack::image_output(const Image& image) const {
  const int64_t size = element_size(image.dtype);
  Output out{};
  out.data = image.data;
  out.pixel = image.stride_w * size;
  out.row = image.stride_h * size;
  out.group = kernel_.group * size;
  out.vector = kVector * size;
  out.stored = image.c;
  out.type = image.dtype;
  return out;
}

// The first map, or any layer's that wants neighbourhoods, from an image.
void Stack::fill(const Image& x, char* map) const {
  const bool gathered = kernel_.gathers(x.c);
  const int64_t pitch = (x.w + 2) * kLine, plane = (x.h + 2) * pitch;
  torch::stable::parallel_for(0, gathered ? x.h : x.h + 2, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals mode;  // the parts that a map of sums is split into may be denormal
    if (gathered) return gather_rows(x, kernel_, begin, end, map + begin * pitch, plane);
    for (int64_t row = begin; row < end; ++row) pack_row(x, kernel_, row, map + row * pitch, plane);
  });
}

// images: the same layer's arguments for each.
void Stack::run_layer(const Layer& layer, const std::vector<Conv3x3Args>& images, char* shared) const {
  const int64_t count = int64_t(images.size());
  if (winograd(layer)) {
    WinogradPlan p = plan(layer, count);
    float* operand = reinterpret_cast<float*>(shared);
    for (p.band = 0; p.band < p.bands(); ++p.band) {
      torch::stable::parallel_for(0, p.prepare_units(), 1, [&](int64_t begin, int64_t end) {
        const FlushDenormals mode;
        for (int64_t unit = begin; unit < end; ++unit) kernel_.winograd_prepare(images.data(), p, unit, operand);
      });
      torch::stable::parallel_for(0, p.run_units(), 1, [&](int64_t begin, int64_t end) {
        const FlushDenormals mode;
        float* own = scratch_floats(p.scratch_floats());
        for (int64_t unit = begin; unit < end; ++unit) kernel_.winograd_run(images.data(), p, unit, operand, own);
      });
    }
    return;
  }
  // The pool drops an odd last row; its convolution need not be computed.
  const int64_t rows = layer.pool && !layer.tap ? layer.h / 2 * 2 : layer.h, strips = ceil_div(rows, kernel_.rows);
  const int64_t groups = kernel_.groups(layer.cout), group_bytes = weight_bytes(layer) / groups;
  const int64_t chunks = count * strips, share = ceil_div(group_bytes, chunks * kLine) * kLine;
  const bool rows_outside = count == 1 && weight_bytes(layer) <= kResidentWeights;
  torch::stable::parallel_for(0, groups * chunks, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals mode;
    float* own = scratch_floats(kernel_.scratch_floats(layer.w));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = rows_outside ? unit % groups : unit / chunks;
      const int64_t chunk = rows_outside ? unit / groups : unit % chunks, row = chunk % strips * kernel_.rows;
      Conv3x3Args args = images[chunk / strips];
      if (!rows_outside) {  // each chunk of a group fetches its share of the next group's weights
        args.next = reinterpret_cast<const char*>(layer.weight) + (group + 1) * group_bytes + chunk * share;
        args.next_lines = unit + chunks < end ? share / kLine : 0;
      }
      kernel_.run(args, group, row, std::min(row + kernel_.rows, rows), own);
    }
  });
}

// Rows [row_begin, row_end) of the first layer's input, and where it has a border one more on either side, as a map.
void Stack::fill_strip(const Image& x, int64_t row_begin, int64_t row_end, char* map) const {
  const int64_t pitch = (x.w + 2) * kLine, plane = (row_end - row_begin + 2) * pitch;
  if (kernel_.gathers(x.c)) return gather_rows(x, kernel_, row_begin, row_end, map, plane);
  for (int64_t row = row_begin; row < row_end + 2; ++row) {
    pack_row(x, kernel_, row, map + (row - row_begin) * pitch, plane);
  }
}

// Strip `strip` of `strips`: rows of the second layer, and where Winograd computes it, whole rows of its chunks.
Stack::Strip Stack::strip_of(int64_t strip, int64_t strips, int64_t rows) const {
  if (!winograd(layers_[1])) return {strip * kStripRows, std::min((strip + 1) * kStripRows, rows), 0, 0};
  const WinogradPlan p = plan(layers_[1]);
  const int64_t first = strip * p.chunk_rows / strips, last = (strip + 1) * p.chunk_rows / strips;
  return {first * p.tile_rows / p.chunk_rows * kTile, std::min(last * p.tile_rows / p.chunk_rows * kTile, layers_[1].h),
          first * p.chunk_columns, last * p.chunk_columns};
}

// The first two layers. Of the maps before and between them only the rows of a strip exist, but rows are counted as in
// the whole map. args: of the second layer, complete but for its input.
void Stack::run_strips(const Image& x, const Results& results, const Conv3x3Args& args, char* shared) const {
  const Layer &first = layers_[0], &second = layers_[1];
  const int64_t rows = second.pool && !second.tap ? second.h / 2 * 2 : second.h;
  const int64_t scale = first.pool ? 2 : 1, x_pitch = (first.w + 2) * kLine, pitch = (second.w + 2) * kLine;
  const bool transformed = winograd(second);
  const WinogradPlan p = plan(second);
  float* weights = reinterpret_cast<float*>(shared);
  int64_t strips = ceil_div(rows, kStripRows), height = kStripRows;
  int64_t floats = std::max(kernel_.scratch_floats(first.w), kernel_.scratch_floats(second.w));
  if (transformed) {
    strips = std::min(strips, p.chunk_rows);
    height = ceil_div(p.chunk_rows, strips) * ceil_div(p.tile_rows, p.chunk_rows) * kTile;
    floats = std::max(floats, p.scratch_floats());
    torch::stable::parallel_for(0, p.prepare_units(), 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals mode;
      for (int64_t unit = begin; unit < end; ++unit) kernel_.winograd_prepare(&args, p, unit, weights);
    });
  }
  const int64_t x_bytes = map_bytes(kernel_.cin_blocks(first.cin) * kernel_.parts, scale * (height + 2), first.w);
  const int64_t map_size = map_bytes(planes(first), height, second.w);
  torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals mode;
    char* inputs = scratch(x_bytes + map_size + floats * int64_t{sizeof(float)});
    char* map = inputs + x_bytes;
    float* own = reinterpret_cast<float*>(map + map_size);
    for (int64_t i = begin; i < end; ++i) {
      const Strip strip = strip_of(i, strips, rows);
      // Rows of the map between the layers that exist; a border of zeros takes the place of the others.
      const int64_t from = std::max<int64_t>(strip.top - 1, 0), to = std::min(strip.bottom + 1, second.h);
      const int64_t plane = (strip.bottom - strip.top + 2) * pitch;
      fill_strip(x, scale * from, scale * to, inputs);
      Conv3x3Args above = arguments(0, results);
      above.x = inputs - scale * from * x_pitch;
      above.x_plane = (scale * (to - from) + 2) * x_pitch;
      above.y = map_output(first, map, strip.bottom - strip.top, second.w);
      above.y.data -= strip.top * pitch;
      for (int64_t j = 0; j < planes(first); ++j) {
        clear_border(map + j * plane, strip.bottom - strip.top, second.w, from == strip.top, to == strip.bottom);
      }
      for (int64_t group = 0; group < kernel_.groups(first.cout); ++group) {
        kernel_.run(above, group, scale * from, scale * to, own);
      }
      Conv3x3Args below = args;
      below.x = map - strip.top * pitch;
      below.x_plane = plane;
      for (int64_t unit = strip.unit_begin; unit < strip.unit_end; ++unit) {
        kernel_.winograd_run(&below, p, unit, weights, own);
      }
      for (int64_t group = 0; !transformed && group < kernel_.groups(second.cout); ++group) {
        kernel_.run(below, group, strip.top, strip.bottom, own);
      }
    }
  });
}

// A layer's map lies at one end of the workspace, what it leaves behind at the other one; then the ends change places.
// Whether the map of layer i is at the beginning.
bool Stack::forward_at(size_t i) const {
  bool forward = true;
  for (size_t j = strips() ? 1 : 0; j < i; ++j) forward ^= !leaves_image(j);
  return forward;
}

// Where layer i reads and writes, with the borders of what it leaves behind.
Conv3x3Args Stack::prepare(const Task& task, size_t i) const {
  const Layer& layer = layers_[i];
  const bool last = i + 1 == layers_.size(), forward = forward_at(i);
  const Buffers b = buffers(i);
  char* out = forward ? task.workspace + workspace_bytes_ - b.out : task.workspace;
  Conv3x3Args args = arguments(i, task.results);
  args.x = forward ? task.workspace : task.workspace + workspace_bytes_ - b.in;
  // No window of the pool holds the last row or column of an odd map: its gradient is zero.
  const bool odd = layer.below.pooled && (layer.out_h() % 2 || layer.out_w() % 2);
  if (!last && !leaves_image(i)) {
    const int64_t plane = (layer.out_h() + 2) * (layer.out_w() + 2) * kLine;
    args.y = map_output(layer, out, layer.out_h(), layer.out_w());
    torch::stable::parallel_for(0, planes(layer), 1, [&](int64_t first, int64_t stop) {
      if (odd) std::memset(out + first * plane, 0, (stop - first) * plane);
      for (int64_t p = first; p < stop; ++p) clear_border(out + p * plane, layer.out_h(), layer.out_w(), true, true);
    });
  } else {
    if (odd) std::memset(out, 0, b.out);
    args.y = image_output(leaves_image(i) ? staged(layer, out, layer.out_h(), layer.out_w()) : task.results.y);
  }
  if (layer.tap) args.tap = image_output(tapped(task, i));
  return args;
}

// Where layer i leaves its tap: the result itself, or its image on the way there.
Image Stack::tapped(const Task& task, size_t i) const {
  const Layer& layer = layers_[i];
  const Buffers b = buffers(i);
  if (writes_directly(layer)) return task.results.taps[tap_of(i)];
  return staged(layer, task.workspace + (forward_at(i) ? b.in : b.out) + b.shared, layer.h, layer.w);
}

// What is left to do when layer i has been computed.
void Stack::finish(const Task& task, size_t i) const {
  const Layer& layer = layers_[i];
  const bool forward = forward_at(i);
  if (layer.tap && !writes_directly(layer)) copy_image(tapped(task, i), task.results.taps[tap_of(i)]);
  if (!leaves_image(i)) return;
  char* const end = task.workspace + workspace_bytes_;
  Image image = staged(layer, forward ? end - buffers(i).out : task.workspace, layer.out_h(), layer.out_w());
  if (i + 1 == layers_.size()) return copy_image(image, task.results.y);
  image.c = layer.cout;
  fill(image, forward ? task.workspace : end - buffers(i + 1).in);
}

void Stack::run(const std::vector<Task>& tasks, size_t begin, size_t end, char* shared) const {
  if (begin == 0 && !strips()) {
    for (const Task& task : tasks) fill(task.x, task.workspace);
  }
  for (size_t i = std::max<size_t>(begin, strips() ? 1 : 0); i < end; ++i) {
    std::vector<Conv3x3Args> images;
    for (const Task& task : tasks) images.push_back(prepare(task, i));
    const Buffers b = buffers(i);
    char* own = tasks.size() > 1 ? shared : tasks[0].workspace + (forward_at(i) ? b.in : b.out);
    if (i == 1 && strips()) {
      run_strips(tasks[0].x, tasks[0].results, images[0], own);
    } else {
      run_layer(layers_[i], images, own);
    }
    for (const Task& task : tasks) finish(task, i);
  }
}

}  // namespace vgg_fast
