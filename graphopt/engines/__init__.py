"""TensorRT and TensorRT-RTX engines, built in a child process."""

from graphopt.engines.build import BuildResult, build_engine
from graphopt.engines.profiles import Profile, make_profiles, parse_shapes

__all__ = ["BuildResult", "Profile", "build_engine", "make_profiles", "parse_shapes"]
