"""Several classifiers in several vision-language spaces: differences and whether their order holds (METHOD section 8)."""
