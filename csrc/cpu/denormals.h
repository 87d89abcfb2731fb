// Denormal operands cost x86 CPUs some 150 cycles for each multiply-add: a layer of such weights ran 160 times slower
// (docs/performance.md).
#pragma once
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace vgg_fast {

// While it lives, this thread reads denormals as zeros and flushes results to zero; then the caller's mode is back, the
// exception flags included. conv_bound in vgg_fast/testing.py has what this may cost: 1e-38 times a sum of weights.
// AMX and AVX512_BF16 products always do so. Elsewhere than on x86 denormals are not known to be slow.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFlushToZero | kDenormalsAreZeros); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFlushToZero = 1u << 15, kDenormalsAreZeros = 1u << 6;  // bits of MXCSR
  const unsigned saved_;
#else
  FlushDenormals() {}
#endif

 public:
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace vgg_fast
