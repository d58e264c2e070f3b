"""How a curvature is fitted: losses of samples, passes, what they note, and sums of it."""
