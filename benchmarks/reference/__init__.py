"""Comparators, written by hand with JAX, optax and NumPyro; they import nothing of ours.

``tests/test_benchmarks.py`` holds their losses equal to ours on the same draws.
"""
