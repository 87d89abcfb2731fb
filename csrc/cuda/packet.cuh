// Elements that lie side by side and move together, up to 16 bytes of them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vgg_fast::cuda {

constexpr int64_t kPacketBytes = 16;

template <typename T, int V>
struct alignas(V * sizeof(T)) Packet {
  T v[V];
};

template <typename T, int V>
__device__ Packet<T, V> load(const void* from, int64_t element) {
  return *reinterpret_cast<const Packet<T, V>*>(static_cast<const T*>(from) + element);
}

template <typename T, int V>
__device__ void store(void* to, int64_t element, const Packet<T, V>& packet) {
  *reinterpret_cast<Packet<T, V>*>(static_cast<T*>(to) + element) = packet;
}

__host__ __device__ inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kPacketBytes == 0;
}

}  // namespace vgg_fast::cuda
