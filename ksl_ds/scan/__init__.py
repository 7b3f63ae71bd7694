"""Where two checkpoints of one model differ: the KS test of every row of every matrix."""
