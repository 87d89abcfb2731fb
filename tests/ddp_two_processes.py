"""Trains an accelerated stack under DistributedDataParallel in two processes; run by test_container_concurrency."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from stacks import fused_copy, image, run, stack
from torch.nn.parallel import DistributedDataParallel


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    model = fused_copy(stack(bn=True))
    if rank == 1:
        model[0].weight.data.zero_()  # DDP broadcasts rank 0's weights, behind the container's back
    run(model, image())
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=2.0**-20, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(image() + rank).square().mean().backward()
        optimizer.step()
    out, segments = run(wrapped, image())
    both = [torch.empty_like(out) for _ in range(2)]
    dist.all_gather(both, out)
    plain = torch.nn.Sequential(*model)
    expected, _ = run(plain, image())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    equal = "weights equal" if torch.equal(*both) else "weights differ"
    # One write, so that the lines of the two processes do not mix.
    os.write(1, f"rank {rank}: fused by {segments[0].kernel}, {equal}\n".encode())
    dist.destroy_process_group()


if __name__ == "__main__":
    child = os.fork()
    work(int(child == 0), sys.argv[1])
    if child == 0:
        os._exit(0)
    sys.exit(os.waitpid(child, 0)[1] != 0)
