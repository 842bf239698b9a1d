"""The two commands, told apart before anything heavy is imported."""

from inputs.drawing import Options
from inputs.options import Config
from keep import faster


def train(config: Config) -> int:
    """python loop.py RECIPE: a run that survives. Returns its exit code."""
    faster.begin(config)  # what waits for hardware, beside the imports that follow
    from keep import training

    return training.main(config)


def draw(options: Options) -> int:
    """python generate.py ADAPTER. Returns its exit code."""
    from keep import drawing

    return drawing.main(options)
