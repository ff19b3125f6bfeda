"""One CRATE layer as one op, :func:`crate_kernels.crate_block`."""
