"""ISTA with a step size or threshold in tensors, or signed: crate_kernels::ista_learned."""
