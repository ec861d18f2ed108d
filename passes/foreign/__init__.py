"""Passes that let other libraries change a model."""
