"""Tests of raysweep.cluster and of cluster.yaml."""
