"""Triton kernels of pyeditfast, one op a file; imported as ``pyeditfast_kernels``."""
