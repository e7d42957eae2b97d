"""Training the models on real data: one loop for all, on Lightning; needs `leedl_fast[models]`."""
