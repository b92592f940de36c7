"""Benchmarks and the pages made from them: one folder for each command, `python -m bench.NAME`. Never installed."""
