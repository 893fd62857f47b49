"""A model's outputs for a set of examples, and their scores."""
