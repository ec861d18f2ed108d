"""Passes for low-rank networks: factors found, chosen, merged and pivoted, permutations and scales folded."""
