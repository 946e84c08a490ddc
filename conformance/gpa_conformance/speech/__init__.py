"""What the family "speech" measures with: an independent recogniser, pitch, word errors, and their intervals.

Audio here is mono at 16000 Hz.
"""
