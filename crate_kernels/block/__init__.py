"""One CRATE layer as one op: norm, MSSA, residual, norm, ISTA (:func:`crate_kernels.crate_block`)."""
