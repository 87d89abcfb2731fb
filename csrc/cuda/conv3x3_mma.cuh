// conv3x3 on tensor cores: an implicit GEMM over a halo tile, for sm_80 and later. Tiles and halo: conv3x3_mma_cuda.h.
//
//                +- parallel -----+- parallel --+- sequential -------------------------------------+
//   CTA          | bm / 2 places  | bn channels | 32 bytes of input channels ("chunk"), kw, kh      |
//   warp         | kUnits units   | kColumns * 8|                                                  |
//   mma          | 16 pixels      | 8           |   one tap of one chunk                           |
//                +----------------+-------------+--------------------------------------------------+
//
// A chunk of the halo comes from global memory once and serves all nine taps: a tap is an offset in shared memory. Of
// the weights one kernel column of a chunk (kw; "step") is a stage of a ring that is filled three steps ahead.
//
// Both lie in planes of 16-byte units: the first halves of all chunks, then the second halves. Eight neighbours of a
// plane are 128 bytes, all banks once: no ldmatrix has a conflict and no address needs a swizzle.
//
// A unit's 4 halo rows are loaded once per kernel column and serve its three taps from registers: the fragment of
// the pair (y, y + 1) shifted by one row is that of (y + 1, y + 2).
//
// The weights' output channels are permuted on their way in, so that the sums a thread ends up with are of 16 bytes of
// neighbouring channels: they leave from the registers, four lanes together 64 bytes.
//
// The order of the sum is fixed by (cin, split): the same bits run to run and for any place in the batch.
#pragma once

#include <cuda_runtime.h>

#include "conv3x3_mma_cuda.h"
#include "numeric.cuh"
#include "ptx.cuh"

namespace vgg_fast::cuda {

template <typename T_, int kTileIndex>
struct MmaTraits {
  using T = T_;
  static constexpr MmaTile kTile = kMmaTiles[kTileIndex];
  static constexpr int kUnits = kTile.units, kColumns = kTile.columns, kBn = kTile.bn, kWarpsN = kTile.warps_n();
  static constexpr int kThreads = 32 * kTile.warps();
  static constexpr int kPositions = kTile.bm / 2;           // of a tile, two pixels each
  static constexpr int kUnit = 16 / sizeof(T);              // channels in 16 bytes
  static constexpr int kPlane = kBn + 4;                    // rows; 4 more, so that two planes lie in different banks
  static constexpr int kWeightStage = 3 * 2 * kPlane * 16;  // bytes: kh, half, output channel
  static constexpr int kVectors = kColumns / (kUnit / 2);   // 16-byte stores of a thread for one pixel
};

// A position (see conv3x3_mma_cuda.h) taken apart.
struct Place {
  int strip;   // counted over all images
  int pair;    // of rows, counted over all strips
  int column;  // of the strip
};

__device__ inline Place place_of(const MmaArgs& a, int position) {
  const int pair = position / a.strip;
  return {pair / a.pairs, pair, position - pair * a.strip};
}

// Where the tile's halo lies in the image: the pixel's index for each of its places in shared memory, -1 for what is
// padding. Returns how many places the tile reads.
template <class K>
__device__ int fill_table(const MmaArgs& a, int first_position, int* table) {
  const Place first = place_of(a, first_position), last = place_of(a, first_position + K::kPositions - 1);
  const int first_pair = first.pair - first.strip * a.pairs;
  const int in_first = 2 * a.pitch * (a.pairs - first_pair) + a.pad;  // places of the first strip, and of the others
  const int in_other = 2 * a.pitch * a.pairs + a.pad;
  const int count = 2 * a.pitch * (last.pair - first.pair + 2) + a.pad * (last.strip - first.strip);
  for (int i = threadIdx.x; i < count; i += K::kThreads) {
    int local = i, strip = first.strip, top = 2 * first_pair - 1;
    if (i >= in_first) {
      const int further = (i - in_first) / in_other;
      local = i - in_first - further * in_other;
      strip += 1 + further;
      top = -1;
    }
    const int row = local / a.pitch, column = local - row * a.pitch, n = strip / a.strips;
    const int y = top + row, x = (strip - n * a.strips) * a.strip + column - 1;
    const bool inside = n < a.n && y >= 0 && y < a.h && x >= 0 && x < a.w && column < a.strip + 2;
    table[i] = inside ? (n * a.h + y) * a.w + x : -1;
  }
  return count;
}

// One chunk's channels of the tile's halo.
template <class K>
__device__ void load_halo(const MmaArgs& a, const int* table, int count, uint32_t stage, int chunk) {
  constexpr int kEach = K::kThreads / 2;  // pixels at once: two threads to a pixel
  const int half = threadIdx.x % 2, channel = (2 * chunk + half) * K::kUnit;
  const typename K::T* x = static_cast<const typename K::T*>(a.x) + channel;
  stage += half * a.halo * 16;
  const auto copy = [&](int i) {
    if (i >= count) return;
    const int pixel = table[i];
    const bool inside = pixel >= 0 && channel < a.cin;
    ptx::cp_async(stage + i * 16, x + static_cast<int64_t>(pixel) * a.cin, inside ? 16 : 0);
  };
  constexpr int kUsual = 4;  // times kEach pixels are most tiles; without a loop they mix with the products
#pragma unroll
  for (int slot = 0; slot < kUsual; ++slot) copy(slot * kEach + threadIdx.x / 2);
#pragma unroll 1
  for (int first = kUsual * kEach; first < count; first += kEach) copy(first + threadIdx.x / 2);
}

// What a thread copies of each step's weights, step after step: 16 bytes of one output channel for each kh. Two threads
// to a channel: a whole sector.
template <class K>
struct WeightLoader {
  const char* from[3];  // by kh
  int tap;              // bytes from a tap to the next
  int channel;          // of the input: of the half chunk that is copied next
  uint32_t offset;      // in the stage
  bool inside;

  __device__ WeightLoader(const MmaArgs& a, int first_channel, int chunk) {
    static_assert(K::kThreads == 2 * K::kBn);
    const int half = threadIdx.x % 2, row = threadIdx.x / 2;
    // Rows 8 j + 2 t + e of a block of 4 * kUnit are channels kUnit * t + 2 j + e: lane t of four then ends up with
    // the sums of kUnit neighbouring channels, its share of kUnit / 2 columns of mma.
    constexpr int kBlock = 4 * K::kUnit;
    const int co = first_channel + row / kBlock * kBlock + row % 8 / 2 * K::kUnit + row % kBlock / 8 * 2 + row % 2;
    inside = co < a.cout;
    tap = a.cin * static_cast<int>(sizeof(typename K::T));
    channel = (2 * chunk + half) * K::kUnit;
    offset = (half * K::kPlane + row) * 16;
    for (int kh = 0; kh < 3; ++kh)
      from[kh] =
          static_cast<const char*>(a.weight) + (int64_t{9} * (inside ? co : 0) + 3 * kh) * tap + chunk * 32 + half * 16;
  }

  __device__ void load(const MmaArgs& a, uint32_t stage, int kw) {
#pragma unroll
    for (int kh = 0; kh < 3; ++kh) {
      // Nothing is read where the size is 0, wherever the address may lie.
      ptx::cp_async(stage + offset + kh * 2 * K::kPlane * 16, from[kh], inside && channel < a.cin ? 16 : 0);
      from[kh] += kw < 2 ? tap : 32 - 2 * tap;
    }
    if (kw == 2) channel += 2 * K::kUnit;
  }
};

// The sums of kernel column kw of a chunk. `units`: where this lane's rows of the units' fragments begin in the stage.
template <class K>
__device__ void multiply(const MmaArgs& a, const int (&units)[K::kUnits], uint32_t halo, uint32_t weights,
                         uint32_t zero, float (&acc)[K::kUnits][K::kColumns][4]) {
  constexpr bool kTf32 = sizeof(typename K::T) == 4;
  // Of two halo rows: (upper, lower) x (first half, second half), the operand of mma as it is. Rows 0 and 1 are kh 0,
  // rows 2 and 3 are kh 2, and kh 1 is made of the middle two.
  uint32_t rows[K::kUnits][3][4];
#pragma unroll
  for (int u = 0; u < K::kUnits; ++u) {
#pragma unroll
    for (int kh = 0; kh < 3; kh += 2) {
      ptx::ldmatrix_x4(rows[u][kh], halo + units[u] + kh * a.pitch * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (kTf32) rows[u][kh][i] = ptx::to_tf32(rows[u][kh][i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[u][1][i] = ptx::kept(rows[u][i % 2 ? 2 : 0][i ^ 1], zero);
  }
#pragma unroll
  for (int kh = 0; kh < 3; ++kh) {
    uint32_t b[K::kColumns / 2][4];
#pragma unroll
    for (int j = 0; j < K::kColumns / 2; ++j) {
      ptx::ldmatrix_x4(b[j], weights + (kh * 2 * K::kPlane + j * 16) * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (kTf32) b[j][i] = ptx::to_tf32(b[j][i]);
    }
#pragma unroll
    for (int u = 0; u < K::kUnits; ++u) {
      const uint32_t* f = rows[u][kh];
#pragma unroll
      for (int j = 0; j < K::kColumns; ++j)
        ptx::mma<typename K::T>(acc[u][j], f[0], f[1], f[2], f[3], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// Adds up what the CTAs of a tile have summed, in the order of their numbers, in the last one of them to arrive.
// Returns whether this is it.
template <class K>
__device__ bool join(const MmaArgs& a, int tile, int part, float (&acc)[K::kUnits][K::kColumns][4]) {
  constexpr int kVectors = K::kUnits * K::kColumns;
  float4* parts = reinterpret_cast<float4*>(a.partial) + static_cast<int64_t>(tile) * a.split * kVectors * K::kThreads +
                  threadIdx.x;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const float* c = acc[i / K::kColumns][i % K::kColumns];
    __stcg(parts + (part * kVectors + i) * K::kThreads, make_float4(c[0], c[1], c[2], c[3]));
  }
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  // Counts from 0 to split - 1 and then is 0 again, for the next launch.
  if (threadIdx.x == 0) last = atomicInc(a.arrived + tile, a.split - 1) == a.split - 1;
  __syncthreads();
  if (!last) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float* c = acc[i / K::kColumns][i % K::kColumns];
    for (int p = 0; p < a.split; ++p) {
      const float4 sum = __ldcg(parts + (p * kVectors + i) * K::kThreads);
      c[0] = p ? c[0] + sum.x : sum.x;
      c[1] = p ? c[1] + sum.y : sum.y;
      c[2] = p ? c[2] + sum.z : sum.z;
      c[3] = p ? c[3] + sum.w : sum.w;
    }
  }
  return true;
}

__device__ inline uint4 packed(const float (&v)[4], float) {
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}

__device__ inline uint4 packed(const float (&v)[8], __half) {
  uint4 all;
  __half2* pairs = reinterpret_cast<__half2*>(&all);
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
  return all;
}

__device__ inline uint4 packed(const float (&v)[8], __nv_bfloat16) {
  uint4 all;
  __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&all);
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
  return all;
}

// ReLU of what packed() gave. Of a NaN it is one.
template <typename Pair>
__device__ uint4 relu(uint4 all) {
  Pair* pairs = reinterpret_cast<Pair*>(&all);
  for (int i = 0; i < 4; ++i) pairs[i] = __hmax2_nan(pairs[i], Pair{});
  return all;
}

// Scales and shifts of the channels that a thread ends up with.
template <class K>
struct Affine {
  float scale[K::kVectors][K::kUnit], shift[K::kVectors][K::kUnit];

  // In shared memory: bn scales and bn shifts, from this thread's first channel on.
  __device__ explicit Affine(const float* from) {
#pragma unroll
    for (int v = 0; v < K::kVectors; ++v)
#pragma unroll
      for (int i = 0; i < K::kUnit; ++i) {
        scale[v][i] = from[v * 4 * K::kUnit + i];
        shift[v][i] = from[K::kBn + v * 4 * K::kUnit + i];
      }
  }
};

// affine and ReLU, one rounding, and the store of the v-th kUnit channels of one pixel, from channel co on.
template <class K>
__device__ void store(const MmaArgs& a, void* out, int64_t pixel, int co, const float (&sum)[K::kUnit],
                      const Affine<K>& affine, int v) {
  using T = typename K::T;
  if (co >= a.cout) return;
  const float floor = a.relu ? 0.0f : __int_as_float(0xff800000);  // -Inf
  float y[K::kUnit];
#pragma unroll
  for (int i = 0; i < K::kUnit; ++i) y[i] = ptx::max_nan(fmaf(sum[i], affine.scale[v][i], affine.shift[v][i]), floor);
  T* to = static_cast<T*>(out) + pixel * a.cout + co;
  if (a.cout % K::kUnit == 0) {
    *reinterpret_cast<uint4*>(to) = packed(y, T());
  } else {
#pragma unroll
    for (int i = 0; i < K::kUnit; ++i)
      if (co + i < a.cout) narrow(y[i], to[i]);
  }
}

// shared_affine: as Affine takes it.
template <class K>
__device__ void epilogue(const MmaArgs& a, int first_position, int first_channel, const float* shared_affine,
                         const float (&acc)[K::kUnits][K::kColumns][4]) {
  constexpr int kEach = K::kUnit / 2;  // neighbouring columns of mma that make 16 bytes
  const int lane = threadIdx.x % 32;
  const Affine<K> affine(shared_affine);
#pragma unroll
  for (int u = 0; u < K::kUnits; ++u) {
    const Place place = place_of(a, first_position + u * 8 + lane / 4);
    const int n = place.strip / a.strips, x = (place.strip - n * a.strips) * a.strip + place.column;
    const int y = 2 * (place.pair - place.strip * a.pairs);
    const bool inside = n < a.n && y < a.h && x < a.w;
    const int64_t pixel = (static_cast<int64_t>(n) * a.h + y) * a.w + x;
    const int64_t window = (static_cast<int64_t>(n) * (a.h / 2) + y / 2) * (a.w / 2) + x / 2;
    const bool is_window = inside && x % 2 == 0 && x + 1 < a.w && y + 1 < a.h;
#pragma unroll
    for (int v = 0; v < K::kVectors; ++v) {
      const int channel = v * 4 * K::kUnit;
      float upper[K::kUnit], lower[K::kUnit], best[K::kUnit];
#pragma unroll
      for (int i = 0; i < K::kUnit; ++i) {
        upper[i] = acc[u][v * kEach + i / 2][i % 2];
        lower[i] = acc[u][v * kEach + i / 2][2 + i % 2];
      }
      if (a.out) {
        if (inside) store<K>(a, a.out, pixel, first_channel + channel, upper, affine, v);
        if (inside && y + 1 < a.h) store<K>(a, a.out, pixel + a.w, first_channel + channel, lower, affine, v);
      }
      if (a.pooled) {  // strips are even: the neighbour in the window is the neighbouring position, 4 lanes on
#pragma unroll
        for (int i = 0; i < K::kUnit; ++i) {
          const float column = ptx::max_nan(upper[i], lower[i]);
          best[i] = ptx::max_nan(column, __shfl_xor_sync(0xffffffff, column, 4));
        }
        if (is_window) store<K>(a, a.pooled, window, first_channel + channel, best, affine, v);
      }
    }
  }
}

// Where this lane's rows of the units' fragments begin in a stage of the halo; lane / 8 is the matrix of ldmatrix.
template <class K>
__device__ void fragment_rows(const MmaArgs& a, int first_position, int warp_m, int (&units)[K::kUnits]) {
  const int lane = threadIdx.x % 32, lower = lane / 8 % 2, half = lane / 16;
  const Place first = place_of(a, first_position);
#pragma unroll
  for (int u = 0; u < K::kUnits; ++u) {
    const Place place = place_of(a, first_position + (warp_m * K::kUnits + u) * 8 + lane % 8);
    const int pixel = 2 * a.pitch * (place.pair - first.pair) + a.pad * (place.strip - first.strip) + place.column;
    units[u] = (half * a.halo + pixel + lower * a.pitch) * 16;
  }
}

// The same of the weights.
template <class K>
__device__ int weight_row(int warp_n) {
  const int lane = threadIdx.x % 32, half = lane / 8 % 2, later = lane / 16;
  return (half * K::kPlane + warp_n * K::kColumns * 8 + later * 8 + lane % 8) * 16;
}

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kTile.resident) conv3x3_mma_kernel(const MmaArgs a) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int part = blockIdx.x % a.split, tile = blockIdx.x / a.split;
  const int first_channel = tile % a.columns * K::kBn, first_position = tile / a.columns * K::kPositions;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / K::kWarpsN, warp_n = warp % K::kWarpsN;

  const int halo_stage = 2 * a.halo * 16;
  const uint32_t weights = ptx::shared_address(memory), halo = weights + kMmaWeightStages * K::kWeightStage;
  float* affine = reinterpret_cast<float*>(memory + kMmaWeightStages * K::kWeightStage + kMmaHaloStages * halo_stage);
  int* table = reinterpret_cast<int*>(affine + 2 * K::kBn);
  const int count = fill_table<K>(a, first_position, table);
  for (int i = threadIdx.x; i < 2 * K::kBn; i += K::kThreads) {
    const int co = first_channel + i % K::kBn;
    affine[i] = co < a.cout ? a.affine[i / K::kBn * a.cout + co] : 0.0f;
  }
  __syncthreads();

  const int chunks = (a.cin + 2 * K::kUnit - 1) / (2 * K::kUnit);
  const int begin = chunks * part / a.split, end = chunks * (part + 1) / a.split;
  WeightLoader<K> loader(a, first_channel, begin);
  load_halo<K>(a, table, count, halo + begin % 2 * halo_stage, begin);
#pragma unroll
  for (int kw = 0; kw < 3; ++kw) {
    loader.load(a, weights + (3 * begin + kw) % kMmaWeightStages * K::kWeightStage, kw);
    ptx::cp_async_commit();
  }

  int units[K::kUnits];
  fragment_rows<K>(a, first_position, warp_m, units);
  const int row = weight_row<K>(warp_n);
  const uint32_t zero = ptx::unknown_zero();
  float acc[K::kUnits][K::kColumns][4] = {};
  for (int chunk = begin; chunk < end; ++chunk) {
#pragma unroll
    for (int kw = 0; kw < 3; ++kw) {
      const int step = 3 * chunk + kw;
      ptx::cp_async_wait<2>();  // this step has come: the two latest groups are of the next two
      __syncthreads();          // for everybody, and everybody is done with the stages that are filled now
      if (chunk + 1 < end) {
        loader.load(a, weights + (step + 3) % kMmaWeightStages * K::kWeightStage, kw);
        if (kw == 0) load_halo<K>(a, table, count, halo + (chunk + 1) % 2 * halo_stage, chunk + 1);
      }
      ptx::cp_async_commit();
      multiply<K>(a, units, halo + chunk % 2 * halo_stage + kw * 16,
                  weights + step % kMmaWeightStages * K::kWeightStage + row, zero, acc);
    }
  }

  if (a.split > 1 && !join<K>(a, tile, part, acc)) return;
  const int channel = warp_n * K::kColumns * 8 + lane % 4 * K::kUnit;
  epilogue<K>(a, first_position + warp_m * K::kUnits * 8, first_channel + channel, affine + channel, acc);
}

}  // namespace vgg_fast::cuda
