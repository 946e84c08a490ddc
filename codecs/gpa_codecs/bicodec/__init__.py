"""BiCodec: semantic codes (what is said) and global codes (who says it) to and from audio (Spark-TTS, 2025)."""
