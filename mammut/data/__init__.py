"""From files to batches.

It has images, texts, sets of examples, and batches with an exact position in the run.
"""
