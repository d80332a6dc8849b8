"""Other unlearning methods that rocr is compared to."""
