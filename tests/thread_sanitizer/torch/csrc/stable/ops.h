// torch::stable::parallel_for with std::thread, whose joins ThreadSanitizer understands (it knows nothing of libgomp's,
// and reports races at every one). The ranges are cut as at::parallel_for cuts them.
#pragma once
#include <algorithm>
#include <optional>
#include <thread>
#include <vector>

#include "tensor.h"

namespace torch::stable {

inline thread_local int64_t num_threads = 1;  // of the parallel regions that this thread starts
inline thread_local bool inside = false;      // a parallel region runs serially inside another

inline uint32_t get_num_threads() { return uint32_t(num_threads); }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t n = end - begin;
  const int64_t threads = inside ? 1 : std::min(num_threads, (n + grain - 1) / std::max<int64_t>(grain, 1));
  if (n <= 0) return;
  if (threads <= 1) return f(begin, end);
  const int64_t each = (n + threads - 1) / threads;
  std::vector<std::thread> workers;
  for (int64_t first = begin; first < end; first += each) {
    workers.emplace_back([&f, first, last = std::min(first + each, end)] {
      inside = true;
      f(first, last);
    });
  }
  for (std::thread& worker : workers) worker.join();
}

inline Tensor empty(std::vector<int64_t> sizes, torch::headeronly::ScalarType type, std::nullopt_t, Device,
                    std::nullopt_t = std::nullopt,
                    torch::headeronly::MemoryFormat format = torch::headeronly::MemoryFormat::Contiguous) {
  return Tensor(std::move(sizes), type, format == torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace torch::stable
