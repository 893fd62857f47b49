"""What a step costs, by its compiled program and by the clock."""
