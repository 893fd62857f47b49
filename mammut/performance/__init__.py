"""The costs of a step, from its compiled program and measured."""
