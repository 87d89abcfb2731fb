// The planner of the tensor-core kernels for ctypes.
#include "block1_cuda.h"

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
}
