"""Weights in two tiers: a part is held in fast memory, the rest is streamed from a slow tier."""
