"""Scores of texts and rankings, as the official tools compute them.

Nothing here needs a model or JAX.
"""
