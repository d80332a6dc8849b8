"""Second moments of ordinary keys: collecting, storing and merging them."""
