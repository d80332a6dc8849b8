"""The closed-form solve of one layer's update."""
