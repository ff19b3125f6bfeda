"""Rotary embedding and RMSNorm of tied tokens: reference.py, op.py, *_kernels.py as in mssa."""
