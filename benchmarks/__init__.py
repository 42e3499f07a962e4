"""Benchmarks: ``python -m benchmarks`` runs those of the performance page.

``benchmarks.costs`` and ``benchmarks.instructions`` compare counts with their limits.
"""
