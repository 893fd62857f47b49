"""From files to batches: images, texts, sets of examples, batches with an exact position."""
