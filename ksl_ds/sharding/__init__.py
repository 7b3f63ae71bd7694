"""The only room that knows how ZeRO lays memory out: whole rows, row masks, engines, collectives."""
