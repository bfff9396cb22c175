"""Whether a feature means something: instruments that ask more of an SAE than to rebuild its input.

Each is a function `(sae, text, config) -> Findings`; `INSTRUMENTS` (tcsae/meaning/measured.py) has
them by the names that `evaluation.meaning` takes. `python -m tcsae.meaning` is its door.
"""
