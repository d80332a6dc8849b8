"""Quantised checkpoints: read, requantise and leave out single weights of each scheme, without its library."""
