"""Runs box3.cu on the virtual GPU: python -m tests.virtual_gpu.examples.box3"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from tests.virtual_gpu import KernelError, launch, ptx_entry
from tests.virtual_gpu.cases import nvcc_ptx

SOURCE = Path(__file__).with_suffix(".cu")


def main(source: Path = SOURCE) -> None:
    x = torch.arange(1024, dtype=torch.float32).view(8, 128)
    out = torch.empty_like(x)
    try:
        launch(ptx_entry(nvcc_ptx(source, "80"), "box3"), (1,), [x, out, len(x)], outputs=[1])
    except KernelError as error:
        print(error)
        return
    expected = F.conv1d(x[:, None], torch.ones(1, 1, 3), padding=1)[:, 0]
    print("right" if torch.equal(out, expected) else "wrong")


if __name__ == "__main__":
    main()
