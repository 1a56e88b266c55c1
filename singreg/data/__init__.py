"""Images: folders, Hugging Face data sets and built-in scenes as splits; cached embeddings; class names, concepts."""
