"""One call of a compiled graph: whose sequence it is, which code each part runs, what is kept and what is returned."""
