"""The paper's own numbers (arXiv:2603.21383), on Qwen3-30B-A3B-Thinking-2507: another scale than ours, quoted beside ours.

Marks: (2nd) from several agreeing summaries of the paper; (src) read in NVIDIA's public recipe.
"""

from typing import NamedTuple


class Quoted(NamedTuple):
    """A number as published, with its mark."""

    value: float
    mark: str = "2nd"

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.mark})"

    @property
    def change(self) -> str:
        """As a difference, with its sign."""
        return f"{self.value:+.2f} ({self.mark})".replace("-", "\u2212")

    @property
    def times(self) -> str:
        return f"{self.value:g}x ({self.mark})"


MODEL = "Qwen3-30B-A3B-Thinking-2507"
# success in percent on tau2-bench, SWE-bench, Terminal-Bench, BrowseComp
BENCHMARKS = ("tau2", "SWE", "Terminal", "BrowseComp")
IN_DOMAIN = {
    "base": (Quoted(44.35), Quoted(19.07), Quoted(5.42), Quoted(2.50)),
    "sft": (Quoted(58.44), Quoted(37.40), Quoted(13.75), Quoted(1.50)),
    "pivotrl": (Quoted(63.81), Quoted(32.67), Quoted(20.00), Quoted(11.30)),
}
MEAN_GAIN = {"sft": Quoted(9.94), "pivotrl": Quoted(14.11)}
RERUN_TAU2 = (Quoted(42.17, "src"), Quoted(48.64, "src"))  # NVIDIA's own run of the tau2 recipe: before, after
# mean change in points over IFBench, AIME25, MATH500, LiveCodeBench, SciCode, MMLU-Pro, MMLU-ProX, WMT24++
OUT_OF_DOMAIN_CHANGE = {"sft": Quoted(-9.83), "pivotrl": Quoted(0.21)}
ABLATION_TAU2 = {"pivotrl": Quoted(63.81), "random": Quoted(59.68), "strict": Quoted(57.34), "sft": Quoted(58.44)}
EQUAL_TURNS = {"pivotrl": Quoted(133_000), "e2e": Quoted(542_000)}  # rollout turns on SWE at equal accuracy
TURNS_RATIO, WALL_RATIO = Quoted(4.0), Quoted(5.5)
DEAD_TURN_SHARE = Quoted(0.71)  # of random turns: all samples pass or all fail
