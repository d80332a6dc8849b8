"""The methods that rocr is compared to."""
