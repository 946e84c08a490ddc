"""What a run found, told on a terminal, in Markdown and as one HTML page; and many runs side by side."""
