"""Weights in two tiers: what stays in fast memory, and what is streamed from a slower one."""
