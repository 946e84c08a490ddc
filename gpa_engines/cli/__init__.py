"""The command line: `gpa-run` transcribes, speaks and converts voices; `gpa-run doctor` explains a checkpoint."""
