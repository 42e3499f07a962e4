"""Benchmarks: ``python -m benchmarks`` runs those of the performance page."""
