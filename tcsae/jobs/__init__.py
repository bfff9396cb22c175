"""Doing runs: alone or as a bank, to the end; loaded SAEs; sharing and tracking."""
