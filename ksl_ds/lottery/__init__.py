"""The method on plain tensors: KS test, selection rules, tickets. No DeepSpeed."""
