"""Passes for networks that decide while they run: If and Loop."""
