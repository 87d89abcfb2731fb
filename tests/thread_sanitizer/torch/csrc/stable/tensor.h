// As much of torch::stable::Tensor as csrc/cpu uses, for a program without PyTorch. Every tensor ends where a page
// ends, and the next page cannot be touched: kernels that read memory by instructions no sanitizer sees (AMX tiles)
// fault there.
#pragma once
#include <sys/mman.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace torch::stable {

struct Device {};

class Tensor {
 public:
  using ScalarType = torch::headeronly::ScalarType;

  Tensor(std::vector<int64_t> sizes, ScalarType type, bool channels_last) : sizes_(std::move(sizes)), type_(type) {
    strides_.resize(sizes_.size());
    std::vector<size_t> inner_first;
    for (size_t d = sizes_.size(); d-- > 0;) inner_first.push_back(d);
    if (channels_last) inner_first = {1, 3, 2, 0};
    int64_t stride = 1;
    for (size_t d : inner_first) {
      strides_[d] = stride;
      stride *= sizes_[d];
    }
    const int64_t page = sysconf(_SC_PAGESIZE), bytes = numel() * width(), pages = (bytes + page - 1) / page + 1;
    void* memory = mmap(nullptr, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    STD_TORCH_CHECK(memory != MAP_FAILED, "no memory");
    char* end = static_cast<char*>(memory) + (pages - 1) * page;
    STD_TORCH_CHECK(mprotect(end, page, PROT_NONE) == 0, "mprotect");
    memory_ = std::shared_ptr<void>(memory, [pages, page](void* p) { munmap(p, pages * page); });
    data_ = end - bytes;
  }

  int64_t dim() const { return int64_t(sizes_.size()); }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  const std::vector<int64_t>& strides() const { return strides_; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t size : sizes_) n *= size;
    return n;
  }
  ScalarType scalar_type() const { return type_; }
  bool is_contiguous() const { return dim() == 0 || strides_.back() == 1; }
  bool is_cpu() const { return true; }
  Device device() const { return {}; }
  const void* const_data_ptr() const { return data_; }
  void* mutable_data_ptr() const { return data_; }

 private:
  int64_t width() const {
    switch (type_) {
      case ScalarType::Byte:
        return 1;
      case ScalarType::BFloat16:
      case ScalarType::Half:
        return 2;
      case ScalarType::Double:
        return 8;
      default:
        return 4;
    }
  }

  std::vector<int64_t> sizes_, strides_;
  ScalarType type_;
  std::shared_ptr<void> memory_;
  char* data_;
};

}  // namespace torch::stable
