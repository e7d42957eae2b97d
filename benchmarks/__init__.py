"""The benchmark suite: pytest-benchmark files, one per op and per model, and their report."""
