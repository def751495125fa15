"""How fast and how small: one command a question, run as `python -m benchmarks.NAME`. See README.md."""
