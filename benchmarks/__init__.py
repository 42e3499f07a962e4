"""Benchmarks: ``python -m benchmarks`` runs all, ``python -m benchmarks.NAME`` one.

Each is a file that says what it measures and how. Beneath them, ``_ways.py`` has the ways
of awaiting what another thread completes, ``_rounds.py`` measures them in turn,
``_report.py`` keeps and prints the samples, ``_plot.py`` draws them.
"""
