"""Running a causal language model on many short sequences: packing, passes, capture."""
