"""Tiny models of many families: what FNGD preconditions in each, checked against the dense oracle."""
