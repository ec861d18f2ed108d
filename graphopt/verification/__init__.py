"""Verification: structure after each pass (T0), each replacement (T1), the whole model (T2), the saved file (T3)."""
