"""Configuration, the two-arm training loop on Accelerate, and checkpoints."""
