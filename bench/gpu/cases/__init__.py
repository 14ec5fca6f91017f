"""One file an op: its inputs, its truth, other ways to compute it, and the work it is."""
