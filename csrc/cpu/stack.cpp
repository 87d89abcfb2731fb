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
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return reinterpret_cast<char*>((address + kLine - 1) / kLine * kLine);
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

WinogradPlan Stack::plan(const Layer& layer) const {
  return winograd_plan(layer.h, layer.w, kernel_.cin_blocks(layer.cin), kernel_.groups(layer.cout), kernel_.group,
                       threads_);
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

void Stack::run_layer(const Layer& layer, const Conv3x3Args& args, char* shared) const {
  if (winograd(layer)) {
    WinogradPlan p = plan(layer);
    float* operand = reinterpret_cast<float*>(shared);
    for (p.band = 0; p.band < p.bands(); ++p.band) {
      torch::stable::parallel_for(0, p.prepare_units(), 1, [&](int64_t begin, int64_t end) {
        const FlushDenormals mode;
        for (int64_t unit = begin; unit < end; ++unit) kernel_.winograd_prepare(args, p, unit, operand);
      });
      torch::stable::parallel_for(0, p.run_units(), 1, [&](int64_t begin, int64_t end) {
        const FlushDenormals mode;
        float* own = scratch_floats(p.scratch_floats());
        for (int64_t unit = begin; unit < end; ++unit) kernel_.winograd_run(args, p, unit, operand, own);
      });
    }
    return;
  }
  // The pool drops an odd last row; its convolution need not be computed.
  const int64_t rows = layer.pool && !layer.tap ? layer.h / 2 * 2 : layer.h, chunks = ceil_div(rows, kernel_.rows);
  const int64_t groups = kernel_.groups(layer.cout);
  const int64_t weight_bytes = kernel_.weight_words(layer.cout, layer.cin) * 4;
  const int64_t share = ceil_div(weight_bytes / groups, chunks * kLine) * kLine;
  const bool rows_outside = weight_bytes <= kResidentWeights;
  torch::stable::parallel_for(0, groups * chunks, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals mode;
    float* own = scratch_floats(kernel_.scratch_floats(layer.w));
    Conv3x3Args unit_args = args;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = rows_outside ? unit % groups : unit / chunks;
      const int64_t row = (rows_outside ? unit / groups : unit % chunks) * kernel_.rows;
      if (!rows_outside) {  // each chunk of a group fetches its share of the next group's weights
        unit_args.next =
            reinterpret_cast<const char*>(layer.weight) + (group + 1) * (weight_bytes / groups) + unit % chunks * share;
        unit_args.next_lines = unit + chunks < end ? share / kLine : 0;
      }
      kernel_.run(unit_args, group, row, std::min(row + kernel_.rows, rows), own);
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
      for (int64_t unit = begin; unit < end; ++unit) kernel_.winograd_prepare(args, p, unit, weights);
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
        kernel_.winograd_run(below, p, unit, weights, own);
      }
      for (int64_t group = 0; !transformed && group < kernel_.groups(second.cout); ++group) {
        kernel_.run(below, group, strip.top, strip.bottom, own);
      }
    }
  });
}

// A layer's map lies at one end of the workspace, what it leaves behind at the other one; then the ends change places.
void Stack::run(const Image& x, const Results& results, char* workspace) const {
  char* const end = workspace + workspace_bytes_;
  bool forward = true;
  if (!strips()) fill(x, workspace);
  auto tap = results.taps.begin();
  for (size_t i = strips() ? 1 : 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const bool last = i + 1 == layers_.size(), map = !last && !leaves_image(i);
    const Buffers b = buffers(i);
    char* in = forward ? workspace : end - b.in;
    char* out = forward ? end - b.out : workspace;
    char* shared = workspace + (forward ? b.in : b.out);
    Conv3x3Args args = arguments(i, results);
    args.x = in;
    // No window of the pool holds the last row or column of an odd map: its gradient is zero.
    const bool odd = layer.below.pooled && (layer.out_h() % 2 || layer.out_w() % 2);
    const Image image = leaves_image(i) ? staged(layer, out, layer.out_h(), layer.out_w()) : results.y;
    if (map) {
      const int64_t plane = (layer.out_h() + 2) * (layer.out_w() + 2) * kLine;
      args.y = map_output(layer, out, layer.out_h(), layer.out_w());
      torch::stable::parallel_for(0, planes(layer), 1, [&](int64_t first, int64_t stop) {
        if (odd) std::memset(out + first * plane, 0, (stop - first) * plane);
        for (int64_t p = first; p < stop; ++p) clear_border(out + p * plane, layer.out_h(), layer.out_w(), true, true);
      });
    } else {
      if (odd) std::memset(out, 0, b.out);
      args.y = image_output(image);
    }
    const Image tapped =
        layer.tap && writes_directly(layer) ? *tap : staged(layer, shared + b.shared, layer.h, layer.w);
    if (layer.tap) args.tap = image_output(tapped);
    if (i == 1 && strips()) {
      run_strips(x, results, args, shared);
    } else {
      run_layer(layer, args, shared);
    }
    if (layer.tap && !writes_directly(layer)) copy_image(tapped, *tap);
    if (layer.tap) ++tap;
    if (map) {
      forward = !forward;
    } else if (last && leaves_image(i)) {
      copy_image(image, results.y);
    } else if (!last) {
      Image next = image;
      next.c = layer.cout;
      fill(next, forward ? workspace : end - buffers(i + 1).in);
    }
  }
}

}  // namespace vgg_fast
