"""The conformance suite: random checkpoints, cases and golden numbers for `xglm_core.compare`."""
