"""What was measured: predictions and their statistics."""
