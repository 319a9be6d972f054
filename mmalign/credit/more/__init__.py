"""Credits beside those of the tour: without a group mean, with the log-ratio to the base model, and sums."""
