"""Attacks on an edited model: attempts to bring back what the edit removed."""
