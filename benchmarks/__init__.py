"""Programs that print the tables of the README and keep the numbers in ``results/``.

``python -m benchmarks.NAME`` runs one from the root of the checkout, ``python -m benchmarks.run_all`` all of them.
"""
