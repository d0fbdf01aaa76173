"""What is asked of a model: the registry of benchmarks, how answers are read, and their metrics."""
