"""Collect, store and merge the second moments of ordinary keys."""
