"""Evaluation programs: see `python -m eval.NAME --help`."""
