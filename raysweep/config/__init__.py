"""What users write: search spaces, their validation and their expansion into trials. No torch, no ray."""
