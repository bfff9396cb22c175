"""How other libraries write an SAE."""
