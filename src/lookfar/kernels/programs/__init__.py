"""Programs in Triton: what kernels run on a GPU, one file for each way to lay out the work."""
