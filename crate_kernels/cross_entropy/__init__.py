"""Cross-entropy: reference.py (the maths), op.py (the public function), *_kernels.py (backends)."""
