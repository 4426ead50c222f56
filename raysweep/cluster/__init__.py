"""Clusters: join the one that runs, or start one here; what its nodes have."""
