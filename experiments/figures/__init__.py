"""The figures of experiments.analyze: each function draws one and returns it with its numbers."""
