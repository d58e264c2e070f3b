"""Numerical kernels: tensors in, tensors out; nothing here knows a module or a data set."""
