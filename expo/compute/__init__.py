"""A piece of a job becomes bytes and sums: the compiled kernels of the CPU."""
