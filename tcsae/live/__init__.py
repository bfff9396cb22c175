"""The live view: one local page on which a text is read and the model steered (tcsae serve)."""
