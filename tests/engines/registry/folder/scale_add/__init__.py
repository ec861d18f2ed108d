"""An operator that nothing of graphopt knows: y = x * scales + offset, as a third party would add it."""
