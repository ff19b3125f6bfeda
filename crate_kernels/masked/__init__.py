"""Around CRATE-MAE's layers: reference.py (the maths), op.py (two ops), *_kernels.py (backends)."""
