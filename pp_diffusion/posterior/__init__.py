"""Posteriors of a user's model with a diffusion prior, and their evidence."""
