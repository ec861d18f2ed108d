"""The nine families that DyCL (Chen et al., ISSTA 2023) evaluated, one module each, written from their papers.

Each module has ``network(size, width, ...)``, which builds the network with seeded weights at the sizes of DyCL's
artefact unless told otherwise, and two factories that `graphopt.export` takes: ``factory`` for the network as a user
has it, with its thresholds inside, and ``forced`` for the same with the thresholds as an input, by which every path
can be taken.
"""
