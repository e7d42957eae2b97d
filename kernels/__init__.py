"""The Triton kernels, one file per op. Importing a file needs Triton; nothing else here does."""
