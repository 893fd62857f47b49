"""From a model to texts: search, generation, likelihood."""
