"""The demonstration: a small model that learns an invented world, and facts of it edited."""
