// The first two layers of a chain as one launch.
#include "block1_cuda.h"
#include "torch_layer.h"
#include "torch_ops.h"

namespace vgg_fast::cuda {

void launch_first_block(const Layer& first, const Layer& second, const void* x, void* full, void* pooled, Queue queue) {
  const Conv3x3Args &a = first.args, &b = second.args;
  Block1Args args{};
  args.x = x;
  args.weight = a.weight;
  args.affine = a.affine;
  args.cin = static_cast<int>(a.cin);
  args.relu = a.relu;
  args.second = mma_args({b.n, b.h, b.w, b.cin, b.cout, b.dtype}, second.plan);
  args.second.weight = b.weight;
  args.second.affine = b.affine;
  args.second.out = full;
  args.second.pooled = pooled;
  args.second.relu = b.relu;
  check_launch("conv3x3", launch_block1(args, b.dtype, second.plan, queue));
}

}  // namespace vgg_fast::cuda
