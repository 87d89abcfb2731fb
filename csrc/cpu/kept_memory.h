// Memory of a thread that is kept between calls, because fresh pages cost a fault each, in huge pages where the system
// has them. Of the calling thread; those it shares work with may read and write it meanwhile.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "../conv3x3.h"
#include "huge_pages.h"

namespace vgg_fast {

enum class Kept { scratch, x, sums, dy, weight, workspace };

// At least so many bytes, their contents whatever was left there; not to be asked for again before it is done with.
inline char* kept(Kept which, int64_t bytes) {
  constexpr int64_t kHugePage = 1 << 21;
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> memory[6];
  thread_local int64_t sizes[6] = {};
  const auto i = static_cast<size_t>(which);
  if (sizes[i] < bytes) {
    memory[i].reset();
    sizes[i] = 0;
    const int64_t size = ceil_div(bytes, kHugePage) * kHugePage;
    memory[i].reset(static_cast<char*>(std::aligned_alloc(kHugePage, size)));
    if (memory[i] == nullptr) throw std::bad_alloc();
    advise_huge_pages(memory[i].get(), size);
    sizes[i] = size;
  }
  return memory[i].get();
}

}  // namespace vgg_fast
