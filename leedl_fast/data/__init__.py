"""Real data for the models, from what is installed already or from the user's own files."""
