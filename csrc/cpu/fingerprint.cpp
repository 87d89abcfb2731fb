// A hash of what the weights hold, cheap enough for every forward pass: PyTorch's version counters miss fused
// optimizers, writes through .data or numpy, and batch-norm's own running statistics.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "torch_cpu.h"

namespace vgg_fast {
namespace {

constexpr int64_t kWhole = 1024;  // tensors of up to this many elements are read as a whole
constexpr int64_t kSample = 64;   // elements of a larger one that is no layer's weight

// Sum over the elements of value x its own odd multiplier: no term waits for another, as it would in a chained hash.
class Sum {
 public:
  // Of the elements from this one on: such sums of parts add up to that of the whole.
  explicit Sum(int64_t first = 0) : multiplier_(kGolden * (2 * uint64_t(first) + 1)) {}
  void add(uint64_t value) {
    sum_ += (value + kGolden) * multiplier_;
    multiplier_ += 2 * kGolden;
  }
  template <class Word>
  void add_element(const char* data, int64_t offset) {
    Word word;
    std::memcpy(&word, data + offset * int64_t{sizeof(Word)}, sizeof word);
    add(word);
  }
  uint64_t value() const { return sum_; }

 private:
  static constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio, odd
  uint64_t sum_ = 0, multiplier_;
};

template <class Word>
void add_tensor(Sum& sum, const Tensor& tensor) {
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t *sizes = tensor.sizes().data(), *strides = tensor.strides().data();
  const int64_t n = tensor.numel(), dims = tensor.dim();
  if (n > kWhole && dims == 2) {
    // One row as a whole, which every column crosses, and an element of each of the others: 40 ns each where the
    // weights have left the caches, as each lies in a page of its own, and half of that with two threads.
    for (int64_t column = 0; column < sizes[1]; ++column) sum.add_element<Word>(data, column * strides[1]);
    std::atomic<uint64_t> total{0};
    torch::stable::parallel_for(1, sizes[0], 512, [&](int64_t begin, int64_t end) {
      Sum part(begin);
      for (int64_t row = begin; row < end; ++row) {
        part.add_element<Word>(data, row * strides[0] + row % sizes[1] * strides[1]);
      }
      total += part.value();
    });
    return sum.add(total);
  }
  if (n > kWhole && dims == 4) {
    // A diagonal: one element at least of every filter and of every input channel. Where most channels are dead, a
    // training step changes a few of them only.
    int64_t filter = 0, channel = 0, row = 0, column = 0;
    for (int64_t i = std::max(sizes[0], sizes[1]); i > 0; --i) {
      sum.add_element<Word>(data, filter * strides[0] + channel * strides[1] + row * strides[2] + column * strides[3]);
      if (++filter == sizes[0]) filter = 0;
      if (++channel == sizes[1]) channel = 0;
      if (++column == sizes[3]) {
        column = 0;
        if (++row == sizes[2]) row = 0;
      }
    }
    return;
  }
  const int64_t reads = n <= kWhole ? n : kSample;
  const bool contiguous = tensor.is_contiguous();
  if (reads == n && contiguous) {
    for (int64_t i = 0; i < n; ++i) sum.add_element<Word>(data, i);
    return;
  }
  for (int64_t i = 0; i < reads; ++i) {
    int64_t element = reads == n ? i : i * (n - 1) / (reads - 1), offset = element;
    if (!contiguous) {
      offset = 0;
      for (int64_t d = dims - 1; d >= 0; --d) {
        offset += element % sizes[d] * strides[d];
        element /= sizes[d];
      }
    }
    sum.add_element<Word>(data, offset);
  }
}

}  // namespace

int64_t fingerprint_cpu(const std::vector<Tensor>& tensors) {
  Sum sum;
  for (const Tensor& tensor : tensors) {
    sum.add(uint64_t(tensor.numel()));
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
        add_tensor<uint32_t>(sum, tensor);
        break;
      case ScalarType::BFloat16:
      case ScalarType::Half:
        add_tensor<uint16_t>(sum, tensor);
        break;
      case ScalarType::Double:
        add_tensor<uint64_t>(sum, tensor);
        break;
      default:
        STD_TORCH_CHECK(false, "fingerprint: tensors must be float32, bfloat16, float16 or float64, got ",
                        name_of(tensor.scalar_type()));
    }
  }
  return static_cast<int64_t>(sum.value());
}

}  // namespace vgg_fast
