"""Observers of a training: loggers, terminal, mask history, and metrics for other callbacks."""
