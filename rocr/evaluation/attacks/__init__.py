"""Attacks on an edited model: what brings forgotten facts back."""
