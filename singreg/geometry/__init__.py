"""Pure tensors: angles and scores, the head's null space, steering. No model, no file, no network."""
