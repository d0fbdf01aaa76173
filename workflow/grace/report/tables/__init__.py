"""The tables of an experiment: Markdown, CSV and LaTeX."""
