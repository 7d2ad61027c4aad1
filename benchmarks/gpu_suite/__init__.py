"""The cases of `benchmarks/gpu.py`."""
