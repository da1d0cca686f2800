"""The generation policy: which token next, and when to stop."""
