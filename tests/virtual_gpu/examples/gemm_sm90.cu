// c[m, n] = sum of a[m, k] * b[n, k], as it is written for sm_90a: one warp copies with TMA, a warpgroup multiplies.
// One CTA computes 64 x 64; m and n are multiples of 64, TMA fills with zeros what hangs over in k.
#include <cuda_fp16.h>

#include <cstdint>

constexpr int kTile = 64, kStages = 2, kTileBytes = kTile * kTile * 2;

struct alignas(64) TensorMap {
  char bytes[128];
};

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ void wait(const uint64_t& barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
      :
      : "r"(shared_address(&barrier)), "r"(parity)
      : "memory");
}

__device__ void copy_tile(const uint8_t* to, const TensorMap& map, int x, int y, const uint64_t& barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               :
               : "r"(shared_address(to)), "l"(&map), "r"(x), "r"(y), "r"(shared_address(&barrier))
               : "memory");
}

// K-major with 128-byte swizzle: 8 rows are 1024 bytes.
__device__ uint64_t descriptor(uint32_t address) {
  return uint64_t{(address & 0x3FFFF) >> 4} | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

#define EIGHT(d, i)                                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define ACCUMULATORS(d) EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24)
#define REGISTERS                                                                \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"

__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " REGISTERS ", %32, %33, 1, 1, 1, 0, 0;"
               : ACCUMULATORS(d)
               : "l"(a), "l"(b));
}

__device__ void multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " REGISTERS
               ", {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
               : ACCUMULATORS(d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

template <bool kAInRegisters>
__device__ void gemm(const TensorMap& a, const TensorMap& b, __half* c, int n, int k) {
  extern __shared__ __align__(1024) uint8_t tiles[];  // [stage][a, b][64 rows of 128 bytes]
  __shared__ uint64_t full[kStages], empty[kStages];
  const int thread = threadIdx.x, steps = (k + kTile - 1) / kTile;
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&full[stage])) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 128;" ::"r"(shared_address(&empty[stage])) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (thread >= 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (thread > 128) return;
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages;
      wait(empty[stage], (step / kStages & 1) ^ 1);  // of a new mbarrier the phase before the first counts as complete
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&full[stage])),
                   "r"(2 * kTileBytes)
                   : "memory");
      uint8_t* tile = tiles + 2 * stage * kTileBytes;
      copy_tile(tile, a, step * kTile, blockIdx.x * kTile, full[stage]);
      copy_tile(tile + kTileBytes, b, step * kTile, blockIdx.y * kTile, full[stage]);
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const int warp = thread / 32, lane = thread % 32;
  float sums[32] = {};
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const uint32_t tile = shared_address(tiles) + 2 * stage * kTileBytes;
    wait(full[stage], step / kStages & 1);
    uint32_t left[4][4];
    if (kAInRegisters) {
      const int row = 16 * warp + lane % 16;
      for (int i = 0; i < 4; ++i)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(left[i][0]), "=r"(left[i][1]), "=r"(left[i][2]), "=r"(left[i][3])
                     : "r"(tile + row * 128 + (((2 * i + lane / 16) ^ (row & 7)) << 4)));
    }
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int i = 0; i < 4; ++i) {
      const uint64_t right = descriptor(tile + kTileBytes + 32 * i);
      if (kAInRegisters)
        multiply(sums, left[i], right);
      else
        multiply(sums, descriptor(tile + 32 * i), right);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&empty[stage])) : "memory");
  }

  for (int i = 0; i < 16; ++i) {
    const int row = blockIdx.x * kTile + 16 * warp + 8 * (i % 2) + lane / 4;
    const int column = blockIdx.y * kTile + i / 2 * 8 + lane % 4 * 2;
    *reinterpret_cast<__half2*>(c + row * n + column) = __floats2half2_rn(sums[2 * i], sums[2 * i + 1]);
  }
}

extern "C" __global__ void __launch_bounds__(256)
    gemm_shared(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, __half* c, int n, int k) {
  gemm<false>(a, b, c, n, k);
}

extern "C" __global__ void __launch_bounds__(256)
    gemm_registers(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, __half* c, int n, int k) {
  gemm<true>(a, b, c, n, k);
}
