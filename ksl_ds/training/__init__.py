"""The training loop that every method shares, and the loss it lowers."""
