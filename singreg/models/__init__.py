"""Thin adapters over timm classifiers and open_clip vision-language models."""
