"""MaMMUT."""
