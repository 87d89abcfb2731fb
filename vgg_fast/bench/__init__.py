"""Timing ours against PyTorch's: problems, contestants, clocks, and the report of ``vgg-fast bench``."""
