"""Metrics of a trained generator."""
