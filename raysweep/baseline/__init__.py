"""Full retraining under a mask: a DeepSpeed engine on the workers of Ray Train."""
