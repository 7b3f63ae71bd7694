"""Tickets of several directions side by side: overlaps, and the transfer of one direction's ticket to another."""
