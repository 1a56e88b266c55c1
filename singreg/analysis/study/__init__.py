"""What a study measures of every arm, and what may be claimed of its targets (METHOD section 8)."""
