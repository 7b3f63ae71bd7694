"""How far a ticket's model agrees with the embed-tuned one: criterion, candidates, measurement, report."""
