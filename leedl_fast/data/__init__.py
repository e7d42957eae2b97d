"""Real data for the models: from installed packages, fetched ones, or the user's own files."""
