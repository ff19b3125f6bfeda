"""Tied embedding: reference.py (the maths), op.py (the function), *_kernels.py (backends)."""
