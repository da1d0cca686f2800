"""How likely texts are: scoring of ids in any backend, and of texts, pairs and words on top of it."""
