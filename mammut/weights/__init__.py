"""Models as files: ours, other people's, and how one starts from another."""
