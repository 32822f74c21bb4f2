"""Posteriors of models with a diffusion prior: p(x) r(x) by sequential Monte Carlo along the reverse trajectory."""
