"""How each result was made, back to the data."""
