"""Means over sequences and their errors against numpy, resampling and tables."""
