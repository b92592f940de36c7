"""Benchmarks and the pages made from them: a folder a command, `python -m bench.NAME`. Never installed."""
