"""The output of a model for a set of examples, and its scores."""
