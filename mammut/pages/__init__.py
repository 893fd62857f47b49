"""What a browser shows: the report of a run; the demo, when it comes."""
