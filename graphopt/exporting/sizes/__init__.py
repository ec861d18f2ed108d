"""Decisions on the sizes of dynamic axes.

torch.export answers Python's question ``x.shape[0] > 6`` as the example has it, and from then on holds for the sizes
alone that answer it so. Here the module is exported once for each answer: what each export took for granted is known
(`guards`), the module is run at sizes that no export holds for, where it runs it is exported again (`regions`), and
the exports become one model, with an If on the sizes (`uniting`).
"""
