// Thin wrappers of the PTX instructions that the tensor-core kernels use: one instruction each, sm_80 and later.
// Section numbers are those of the PTX ISA 8.8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace vgg_fast::cuda::ptx {

// The address of shared memory as the instructions below take it.
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 9.7.9.25.3: 16 bytes to shared memory past the registers and the L1; what `bytes` (0 or 16) leaves out becomes zero.
__device__ inline void cp_async(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 9.7.14.5.15: four 8x8 matrices of 16-bit elements, or 8x4 of 32-bit ones; lane 8 * i + r names row r of matrix i.
__device__ inline void ldmatrix_x4(uint32_t (&d)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared)
               : "memory");
}

// 9.7.14.5: c += a * b on a warp: 16 x 32 bytes of a, 32 bytes x 8 of b, fp32 sums. T names the type of the operands,
// float stands for tf32.
template <typename T>
__device__ inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1);

#define VGG_FAST_MMA(T, shape, type)                                                                            \
  template <>                                                                                                   \
  __device__ inline void mma<T>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, \
                                uint32_t b1) {                                                                  \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                                        \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                         \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                               \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                       \
  }
VGG_FAST_MMA(__half, "m16n8k16", "f16")
VGG_FAST_MMA(__nv_bfloat16, "m16n8k16", "bf16")
VGG_FAST_MMA(float, "m16n8k8", "tf32")
#undef VGG_FAST_MMA

// 9.7.9.22: fp32 to tf32, to nearest with ties away from zero; mma alone would cut the lower bits off.
__device__ inline uint32_t to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// 9.7.3.12: the larger one, or NaN if either is.
__device__ inline float max_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// 10.10: a zero that ptxas does not know to be one, in grids of one dimension.
__device__ inline uint32_t unknown_zero() {
  uint32_t zero;
  asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(zero));
  return zero;
}

// value, in a register of its own. A copy would be made again before each use: four moves for each mma whose operand
// is not four neighbouring registers as they come from ldmatrix.
__device__ inline uint32_t kept(uint32_t value, uint32_t zero) {
  asm volatile("or.b32 %0, %0, %1;" : "+r"(value) : "r"(zero));
  return value;
}

}  // namespace vgg_fast::cuda::ptx
