"""Pure maths on tensors: input statistics, scores and masks. Nothing here changes a tensor of the caller."""
