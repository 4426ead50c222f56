"""Sweeps: from a search space to trials, through Ray Tune and a shard group, to rows."""
