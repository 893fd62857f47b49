"""A run: its config, its tasks, its step, its folder."""
