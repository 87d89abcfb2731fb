// A hash of what the weights hold, cheap enough for every forward pass: PyTorch's version counters miss fused
// optimizers, writes through .data or numpy, and batch-norm's own running statistics.
#include <algorithm>
#include <cstring>

#include "torch_cpu.h"

namespace vgg_fast {
namespace {

constexpr int64_t kWhole = 1024;  // tensors of up to this many elements are read as a whole
constexpr int64_t kSample = 64;   // elements of a larger one that is no layer's weight

// Sum over the elements of value x its own odd multiplier: no term waits for another, as it would in a chained hash.
class Sum {
 public:
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
  uint64_t sum_ = 0, multiplier_ = kGolden;
};

template <class Word>
void add_tensor(Sum& sum, const Tensor& tensor) {
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t *sizes = tensor.sizes().data(), *strides = tensor.strides().data();
  const int64_t n = tensor.numel(), dims = tensor.dim();
  if (n > kWhole && dims == 2) {
    // A diagonal: one element at least of every row and of every column.
    int64_t row = 0, column = 0;
    for (int64_t i = std::max(sizes[0], sizes[1]); i > 0; --i) {
      sum.add_element<Word>(data, row * strides[0] + column * strides[1]);
      if (++row == sizes[0]) row = 0;
      if (++column == sizes[1]) column = 0;
    }
    return;
  }
  if (n > kWhole && dims == 4) {
    // The same of every filter and of every input channel. Where most channels are dead, a training step changes a few
    // of them only.
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
        STD_TORCH_CHECK(false, "fingerprint: tensors must be floating point");
    }
  }
  return static_cast<int64_t>(sum.value());
}

}  // namespace vgg_fast
