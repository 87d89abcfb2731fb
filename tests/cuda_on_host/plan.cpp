// The planners of the CUDA kernels for ctypes.
#include <algorithm>
#include <vector>

#include "block1_cuda.h"
#include "conv3x3.cuh"
#include "layer_cuda.h"

using namespace vgg_fast::cuda;

extern "C" {

__attribute__((visibility("default"))) const char* mma_unsupported_for(const MmaProblem* problem) {
  return mma_unsupported(*problem);
}

__attribute__((visibility("default"))) void plan_for(const MmaProblem* problem, int multiprocessors, int tile,
                                                     int split, MmaPlan* plan) {
  *plan = plan_mma(*problem, multiprocessors, tile, split);
}

__attribute__((visibility("default"))) void args_for(const MmaProblem* problem, const MmaPlan* plan, MmaArgs* args) {
  *args = mma_args(*problem, *plan);
}

__attribute__((visibility("default"))) void plan_block1_for(int64_t n, int64_t h, int64_t w, MmaPlan* plan) {
  *plan = plan_block1(n, h, w);
}

__attribute__((visibility("default"))) int64_t plain_blocks_for(const Conv3x3Args* args) {
  return (conv3x3_items(*args) + kThreads - 1) / kThreads;
}

__attribute__((visibility("default"))) int mma_weight_stages() { return kMmaWeightStages; }

__attribute__((visibility("default"))) int mma_halo_stages() { return kMmaHaloStages; }

// What conv_stack (csrc/cuda/conv_stack.cpp) decides about a chain: chain[i] has dtype, sizes, step and alignment, and
// gets the rest.
__attribute__((visibility("default"))) void plan_chain_for(Layer* chain, int count, int family, int sm,
                                                           int multiprocessors) {
  std::vector<Layer> layers(chain, chain + count);
  for (Layer& layer : layers) choose_kernel(layer, static_cast<Family>(family), {sm, multiprocessors});
  fuse_first_block(layers);
  std::copy(layers.begin(), layers.end(), chain);
}
}
