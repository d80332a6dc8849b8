"""Files and untrusted input: atomic output, locks, tensors, JSON, disk space, errors of other libraries."""
