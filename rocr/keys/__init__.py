"""Which tokens become keys, and reading keys and states from a model."""
