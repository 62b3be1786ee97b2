"""Measurements that are more than a row of `smolrun bench`: guesses on real prompts, a device as it heats, several
devices side by side."""
