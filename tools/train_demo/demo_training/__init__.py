"""The recipe of the demo checkpoint: spoken digits from nothing but a synthesiser and a seed."""
