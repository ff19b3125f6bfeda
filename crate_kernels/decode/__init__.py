"""One step of generation on a cache of one tensor, :func:`crate_kernels.tied_attention_decode`."""
