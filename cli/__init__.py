"""The ``graphopt`` command: one module a subcommand, none with logic of its own."""
