"""Generation: which token comes next, and when to stop."""
