"""The parts of benchmarks/tradeoffs.py."""
