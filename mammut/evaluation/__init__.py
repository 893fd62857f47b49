"""What a model says of a set, and what that scores."""
