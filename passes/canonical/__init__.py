"""Passes that bring a graph into its simplest form without changing what it computes."""
