"""Audio to token ids and back. Knows no engine; framework code lives in the modules that need it."""
