"""Evaluation programs: `python -m eval.NAME --help` tells what each does."""
