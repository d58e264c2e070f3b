"""Fitting a curvature: per-sample losses, passes, their records, and sums over them."""
