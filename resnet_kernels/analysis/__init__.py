"""Measurements and predictions: memory traffic, rooflines, launch tables, results files, reports."""
