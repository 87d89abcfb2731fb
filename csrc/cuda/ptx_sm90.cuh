// Thin wrappers over the sm_90a instructions that CUDA C++ has no words for; names and semantics are those of the PTX
// ISA 9.0: mbarrier 9.7.13.15, cp.async.bulk.tensor 9.7.9.27, wgmma 9.7.15, setmaxnreg 9.7.20.5,
// movmatrix 9.7.14.5.17.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace vgg_fast::cuda::ptx90 {

// mbarriers are named by their addresses in shared memory.

__device__ inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the mbarriers of this thread known to the async proxy.
__device__ inline void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity is complete; of a new mbarrier the phase of parity 1 counts as complete.
__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
          "r"(barrier),
      "r"(parity)
      : "memory");
}

// bar.sync of some of a CTA's warps: `threads` of them meet at barrier `number`.
__device__ inline void barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// The same without waiting for the others.
__device__ inline void barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ inline void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ inline uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// A box of a tensor at these coordinates, innermost first; the mbarrier counts its bytes.

__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
      : "memory");
}

__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3,
                                int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, %6}], "
      "[%7];" ::"r"(to),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "r"(barrier)
      : "memory");
}

__device__ inline void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// An 8 x 8 matrix of 16-bit elements over a warp, transposed: lane 4 * r + c holds elements 2 c and 2 c + 1 of row r.
__device__ inline uint32_t transpose8x8(uint32_t pair) {
  uint32_t turned;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
  return turned;
}

// All four warps of a warpgroup must execute these.

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kGroups committed groups are still under way.
template <int kGroups>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// No instruction: the compiler may not read the accumulators of a product before here. Of wgmma_wait it does not know
// that they depend on it.
template <int kCount>
__device__ inline void wgmma_settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// A matrix in shared memory, K-major (9.7.15.5.1.2). Core matrices are 8 rows of 16 bytes; those that are neighbours
// along the rows lie `stride` bytes apart. Without swizzling the rows of a core matrix lie side by side, and neighbours
// along k are `leading` bytes apart; with 128-byte swizzling a row is 128 bytes, and `leading` means nothing.
__host__ __device__ constexpr uint64_t matrix_descriptor(int leading, int stride, bool swizzle128) {
  return uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(swizzle128) << 62;
}

// The descriptor of the matrix at this address; addresses are below 2^18, so that bits never carry out of the field.
__device__ inline uint64_t at(uint64_t descriptor, uint32_t address) { return descriptor | (address >> 4); }

#define VGG_FAST_FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define VGG_FAST_EIGHT(d, i) VGG_FAST_FOUR(d, i), VGG_FAST_FOUR(d, i + 4)
#define VGG_FAST_56(d)                                                                                             \
  VGG_FAST_EIGHT(d, 0), VGG_FAST_EIGHT(d, 8), VGG_FAST_EIGHT(d, 16), VGG_FAST_EIGHT(d, 24), VGG_FAST_EIGHT(d, 32), \
      VGG_FAST_EIGHT(d, 40), VGG_FAST_EIGHT(d, 48)
#define VGG_FAST_D_0_TO_55                                                           \
  " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "         \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55"
#define VGG_FAST_WGMMA_N112(depth, type, majors)                                            \
  asm volatile(                                                                             \
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %58, 0;\n"                                    \
      "wgmma.mma_async.sync.aligned.m64n112" depth ".f32." type "." type VGG_FAST_D_0_TO_55 \
      "}, %56, %57, adds, 1, 1" majors ";\n}"                                               \
      : VGG_FAST_56(d)                                                                      \
      : "l"(a), "l"(b), "r"(int{adds}))
#define VGG_FAST_WGMMA_N128(depth, type, majors)                                            \
  asm volatile(                                                                             \
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"                                    \
      "wgmma.mma_async.sync.aligned.m64n128" depth ".f32." type "." type VGG_FAST_D_0_TO_55 \
      ", %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, adds, 1, 1" majors ";\n}"       \
      : VGG_FAST_56(d), VGG_FAST_EIGHT(d, 56)                                               \
      : "l"(a), "l"(b), "r"(int{adds}))
#define VGG_FAST_WGMMA(depth, type, majors)   \
  if constexpr (kCount == 56)                 \
    VGG_FAST_WGMMA_N112(depth, type, majors); \
  else                                        \
    VGG_FAST_WGMMA_N128(depth, type, majors)

// d = a b (+ d if adds): a is [64, 32 bytes], b is [32 bytes, n] with n = 2 * kCount, both K-major; d[4 * j + 2 * s +
// e] is row 16 * warp + 8 * s + lane / 4, column 8 * j + 2 * (lane % 4) + e. Asynchronous: d may be used after
// wgmma_wait and wgmma_settle. float stands for tf32.
template <typename T, int kCount>
__device__ inline void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool adds) {
  static_assert(kCount == 56 || kCount == 64);
  if constexpr (std::is_same_v<T, float>) {
    VGG_FAST_WGMMA("k8", "tf32", "");
  } else if constexpr (std::is_same_v<T, __half>) {
    VGG_FAST_WGMMA("k16", "f16", ", 0, 0");
  } else {
    VGG_FAST_WGMMA("k16", "bf16", ", 0, 0");
  }
}

#undef VGG_FAST_WGMMA
#undef VGG_FAST_WGMMA_N128
#undef VGG_FAST_WGMMA_N112
#undef VGG_FAST_D_0_TO_55
#undef VGG_FAST_56
#undef VGG_FAST_EIGHT
#undef VGG_FAST_FOUR

}  // namespace vgg_fast::cuda::ptx90
