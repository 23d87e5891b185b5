"""Holds what the commands share: flags, a run's folder, processes, errors and files."""
