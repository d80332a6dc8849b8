"""Choose the tokens that become keys, and read keys and states from a model."""
