"""A Triton kernel that loads and stores through tensor descriptors: TMA, mbarriers and stmatrix on sm_90."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gemm(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c[m, n] = sum of a[m, k] * b[n, k]; the descriptors zero-fill what hangs over."""
    m = tl.program_id(0) * BM
    n = tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc)
    c.store([m, n], acc.to(tl.float16))
