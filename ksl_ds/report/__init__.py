"""Tracking, tables, plots, the HTML report."""
