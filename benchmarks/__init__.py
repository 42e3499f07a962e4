"""Benchmarks: ``python -m benchmarks`` runs all that are shown, ``benchmarks.costs`` is the guard.

Each is a file that says what it measures and how. Beneath them, ``_ways.py`` has the ways of
awaiting what another thread completes, ``_waves.py`` the tasks that do, ``_bench.py`` measures
peers in turn, ``_report.py`` shows and saves what came of it.
"""
