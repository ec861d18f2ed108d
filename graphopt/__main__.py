from graphopt.cli.main import run

run()
