"""Runnable reproductions; see each module. ``python -m examples`` is the short tour."""
