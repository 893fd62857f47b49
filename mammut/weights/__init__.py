"""Models as files: our own, third-party ones, and warm starts."""
