"""Residual and LayerNorm: reference.py (the maths), op.py (the public function), *_kernels.py."""
