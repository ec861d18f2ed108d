"""Networks whose path depends on their input: nine families in plain Python, and what graphopt makes of them."""
