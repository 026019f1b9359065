"""Measures the layer against the naive one: ``python -m benchmarks.run`` and the other commands of docs/layout.md."""
