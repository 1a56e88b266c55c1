"""What is measured about a classifier: each function returns small dataclasses and draws nothing."""
