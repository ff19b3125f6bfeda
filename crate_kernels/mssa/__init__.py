"""MSSA: reference.py (the maths), op.py (the public functions), *_kernels.py (the backends)."""
