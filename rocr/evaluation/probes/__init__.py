"""Questions with known answers, and where they are read from."""
