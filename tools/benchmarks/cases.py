"""The cases and the model shape that the benchmarks of a training step share, so that they compare like with like.

Standard library only: trl_step.py runs in an environment that this project is not installed in.
"""

import argparse
from pathlib import Path

CASES = ["256,32,8", "1024,64,16", "2048,128,16"]
SHAPE = {"layers": 4, "hidden": 128, "heads": 4, "groups": 2, "experts": 8, "vocab": 1024}


def parser(description: str | None) -> argparse.ArgumentParser:
    """--json, --cases, --repeats and one flag per number of the model's shape."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, required=True, help="where the list of results goes")
    made.add_argument("--cases", nargs="+", default=[case(text) for text in CASES], type=case, metavar="P,R,G")
    made.add_argument("--repeats", type=int, default=3)
    for name, default in SHAPE.items():
        made.add_argument(f"--{name}", type=int, default=default)
    return made


def case(text: str) -> tuple[int, int, int]:
    """`P,R,G`: history tokens, tokens of one action, actions."""
    prompt, reply, group = (int(part) for part in text.split(","))
    return prompt, reply, group
