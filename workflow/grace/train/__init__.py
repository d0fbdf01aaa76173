"""One training loop for the teacher, the baseline and every recipe."""
