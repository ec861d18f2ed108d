"""Custom operators of the domain ``graphopt``: one folder an operator."""
