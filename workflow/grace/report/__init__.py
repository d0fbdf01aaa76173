"""From predictions and measurements to tables, figures, metrics and one page."""
