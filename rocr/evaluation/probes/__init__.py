"""Questions with known answers, and the readers of their files and datasets."""
