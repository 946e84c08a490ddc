"""From a checkpoint in the released layout to a folder for MLX, whole or quantised, without torch.

plan.py says what will be written and refuses what cannot be; writing.py writes it; verification.py reads it again.
"""
