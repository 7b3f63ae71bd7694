"""Tickets beside their controls and other methods: entries, runs, tests, tables, plots."""
