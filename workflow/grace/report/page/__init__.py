"""The page of an experiment: report/index.html."""
