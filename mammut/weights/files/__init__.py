"""Tensor files of others, opened by their header: nothing in them is executed."""
