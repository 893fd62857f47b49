"""Layers, towers, the two passes, adapters and losses.

Every function takes arrays and returns arrays.
"""
