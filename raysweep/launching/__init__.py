"""A sweep from beginning to end: what is missing, in which phases, on which processes."""
