"""Benchmarks: ``python -m benchmarks`` runs those of the performance page.

``python -m benchmarks.costs`` compares counts with their limits.
"""
