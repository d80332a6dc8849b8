"""Files and text from outside: atomic output, locks, tensors, untrusted JSON, disk space."""
