"""Evaluation of trained generators: metrics, projection, editing."""
