"""Scores of texts and rankings, as the official tools compute them: no model, no JAX."""
