"""A fixed set of predictions, and the table of what they were when somebody last agreed to them."""
