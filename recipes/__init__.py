"""Recipes: one readable script per job, launched with accelerate."""
