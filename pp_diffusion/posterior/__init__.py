"""Posteriors of models with a diffusion prior."""
