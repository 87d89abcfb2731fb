"""The GPU of this machine, and (tuning.py, winners.py) which kernel is the fastest on it, by measurement."""

from vgg_fast.gpu.device import Unavailable, describe, explain_lack, lacking, named, place, versions
from vgg_fast.gpu.nvidia_smi import Clocks, clocks_under, parse_clocks, said_under
from vgg_fast.gpu.stream import capturing, clock, keep_busy, synchronize
from vgg_fast.precision import FLOAT32, float32, float32_name

__all__ = [
    "FLOAT32",
    "Clocks",
    "Unavailable",
    "capturing",
    "clock",
    "clocks_under",
    "describe",
    "explain_lack",
    "float32",
    "float32_name",
    "keep_busy",
    "lacking",
    "named",
    "parse_clocks",
    "place",
    "said_under",
    "synchronize",
    "versions",
]
