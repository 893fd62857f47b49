"""Foreign tensor files, opened by their header.

Nothing in them is executed.
"""
