"""Shards of a model that stay while trials flow: plan, plain worker, group of Ray actors, and its local twin."""
