"""Evaluation: what a checkpoint recalls at which length, beside what would be recalled without its memory."""
