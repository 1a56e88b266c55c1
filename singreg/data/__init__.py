"""Images: folders, Hugging Face data sets and built-in scenes as splits; the embedding cache; class and concept names."""
