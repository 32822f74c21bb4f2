"""NumPyro model scripts, one per experiment, each to be copied as a start."""
