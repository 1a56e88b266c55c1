"""What every recipe starts from: configurations, the parts, models and embeddings they name, a run's folder."""
