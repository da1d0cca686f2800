"""The harness's own command line, with `--model xglm`: `python -m xglm_core.evaluation run ...`."""

from xglm_core.evaluation.harness import register


def main() -> None:
    """Registers the model and runs the harness."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
