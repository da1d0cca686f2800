"""transformers' own tests of its model and tokenizer classes, run against ours."""
