"""wav2vec 2.0 (Baevski et al. 2020), as far as BiCodec needs it: hidden states 11, 14 and 16."""
