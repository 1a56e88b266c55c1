"""Configurations: one YAML per job."""
