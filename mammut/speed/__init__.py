"""How fast: what `python -m eval.speed` measures, of mammut alone and beside a peer in the same process."""
