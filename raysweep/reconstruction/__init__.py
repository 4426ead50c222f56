"""Recovers pruned weights: one unit, or one range of blocks, in one process. No Ray."""
