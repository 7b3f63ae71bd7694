"""The mathematics of the lottery, on plain tensors: KS test, choice of rows, tickets."""
