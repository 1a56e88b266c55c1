"""Jobs that measure and train nothing: one configuration and one job class for each recipe."""
