"""The fused branches as CUDA kernels: sources of a library that `--kernels` loads, and their build."""
