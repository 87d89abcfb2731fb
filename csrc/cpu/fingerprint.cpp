// A hash of what the weights hold, cheap enough for every forward pass: PyTorch's version counters miss fused
// optimizers, writes through .data or numpy, and batch-norm's own running statistics.
#include <algorithm>
#include <cstring>

#include "torch_cpu.h"

namespace vgg_fast {
namespace {

// Elements read of one tensor. A sample of a larger one is spread evenly and ends on its last element.
constexpr int64_t kWhole = 1024, kSample = 64;

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
  return hash ^ (hash >> 32);
}

template <class Word>
uint64_t hash_elements(uint64_t hash, const Tensor& tensor) {
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t n = tensor.numel(), reads = n <= kWhole ? n : kSample, dims = tensor.dim();
  const int64_t* sizes = tensor.sizes().data();
  const int64_t* strides = tensor.strides().data();
  const bool contiguous = tensor.is_contiguous();
  for (int64_t i = 0; i < reads; ++i) {
    int64_t element = reads == n ? i : i * (n - 1) / (reads - 1), offset = element;
    if (!contiguous) {
      offset = 0;
      for (int64_t d = dims - 1; d >= 0; --d) {
        offset += element % sizes[d] * strides[d];
        element /= sizes[d];
      }
    }
    Word word;
    std::memcpy(&word, data + offset * int64_t{sizeof(Word)}, sizeof word);
    hash = mix(hash, word);
  }
  return hash;
}

}  // namespace

int64_t fingerprint_cpu(const std::vector<Tensor>& tensors) {
  uint64_t hash = 0;
  for (const Tensor& tensor : tensors) {
    hash = mix(hash, uint64_t(tensor.numel()));
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
        hash = hash_elements<uint32_t>(hash, tensor);
        break;
      case ScalarType::BFloat16:
      case ScalarType::Half:
        hash = hash_elements<uint16_t>(hash, tensor);
        break;
      case ScalarType::Double:
        hash = hash_elements<uint64_t>(hash, tensor);
        break;
      default:
        STD_TORCH_CHECK(false, "fingerprint: tensors must be floating point");
    }
  }
  return static_cast<int64_t>(hash);
}

}  // namespace vgg_fast
