"""Models: load and check them, find the weights to edit, and read keys and states."""
