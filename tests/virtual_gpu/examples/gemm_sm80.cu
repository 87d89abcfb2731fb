// c[m, n] = sum of a[m, k] * b[n, k], as it is written for sm_80: cp.async in two stages, ldmatrix, mma.sync.
// One CTA of four warps computes 64 x 64; m and n are multiples of 64, k of 32.
#include <cuda_fp16.h>

#include <cstdint>

constexpr int kTile = 64, kDepth = 32, kRowBytes = kDepth * 2, kTileBytes = kTile * kRowBytes;

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A row has four 16-byte chunks; two rows fill all banks, so the chunks change places every two rows.
__device__ int chunk_offset(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row / 2 & 3)) << 4); }

__device__ void load_matrices(uint32_t (&registers)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address));
}

__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(128) gemm(const __half* a, const __half* b, __half* c, int n, int k) {
  __shared__ __align__(128) uint8_t tiles[2][2][kTileBytes];  // [stage][a, b]
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const __half* sources[2] = {a + blockIdx.x * kTile * k, b + blockIdx.y * kTile * k};

  auto copy = [&](int step) {
    for (int operand = 0; operand < 2; ++operand)
      for (int i = thread; i < kTile * 4; i += 128) {
        const int row = i / 4, chunk = i % 4;
        const __half* from = sources[operand] + row * k + step * kDepth + chunk * 8;
        const uint32_t to = shared_address(&tiles[step % 2][operand][chunk_offset(row, chunk)]);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
      }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  float sums[2][4][4] = {};
  const int m0 = warp / 2 * 32, n0 = warp % 2 * 32;
  copy(0);
  for (int step = 0; step < k / kDepth; ++step) {
    if (step + 1 < k / kDepth) {
      copy(step + 1);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    for (int chunk = 0; chunk < 4; chunk += 2) {
      uint32_t left[2][4], right[2][4];
      for (int i = 0; i < 2; ++i) {
        const int row = lane % 16, column = chunk + lane / 16;
        load_matrices(left[i], shared_address(&tiles[step % 2][0][chunk_offset(m0 + 16 * i + row, column)]));
        load_matrices(right[i], shared_address(&tiles[step % 2][1][chunk_offset(n0 + 16 * i + row, column)]));
      }
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j) multiply(sums[i][j], left[i], right[j / 2][j % 2], right[j / 2][j % 2 + 2]);
    }
    __syncthreads();
  }

  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
      for (int half = 0; half < 2; ++half) {
        const int row = blockIdx.x * kTile + m0 + 16 * i + 8 * half + lane / 4;
        const int column = blockIdx.y * kTile + n0 + 8 * j + lane % 4 * 2;
        const __half2 pair = __floats2half2_rn(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        *reinterpret_cast<__half2*>(c + row * n + column) = pair;
      }
}
