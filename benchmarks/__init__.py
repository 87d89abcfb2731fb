"""``python -m pytest benchmarks/bench_*.py``, and the comparison with other engines, ``python -m benchmarks.peers``."""
