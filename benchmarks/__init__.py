"""Benchmarks; each compares its candidates in one run on one machine."""
