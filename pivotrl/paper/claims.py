"""The paper's claims, each judged by the numbers of this comparison: it holds here, does not, or cannot be told."""

from collections.abc import Mapping
from dataclasses import dataclass

from pivotrl.paper import published
from pivotrl.paper.results import Result
from pivotrl.paper.statistics import SIGMAS, Difference, equal_success, greedy, mean, skill_change, success_difference

TASK_MARGIN, SKILL_MARGIN = 0.05, 0.02  # "no worse" must rule a larger loss out
HOLDS, FAILS, OPEN = "holds here", "does not hold here", "cannot be told here"
Results = Mapping[str, Mapping[int, Result]]


@dataclass(frozen=True)
class Claim:
    """`verdict` is one of HOLDS, FAILS, OPEN; `sentence` gives the numbers that decided."""

    claim: str
    paper: str
    verdict: str
    sentence: str


def judge(results: Results) -> list[Claim]:
    """Every claim that the finished cells can speak to."""
    found = [
        _better(results, "pivotrl", "sft", "In domain, PivotRL beats SFT on the same data", _tau2("pivotrl", "sft")),
        _sft_loses(results),
        _pivotrl_keeps(results),
        _as_good_as_e2e(results),
        *_cheaper(results),
        _better(results, "pivotrl", "random", "Selecting pivots helps", _ablated("random")),
        _better(results, "pivotrl", "strict", "Functional reward helps", _ablated("strict")),
        _dead_turns(results),
        _deviation(results),
    ]
    return [claim for claim in found if claim is not None]


def shown(difference: Difference) -> str:
    """`+12.3 points (standard error 2.1)`."""
    error = "unknown" if difference.error is None else f"{100 * difference.error:.1f}"
    points = f"{100 * difference.mean:+.1f}".replace("-", "\u2212")
    return f"{points} points (standard error {error})"


def _no_worse(difference: Difference, margin: float) -> str:
    """A loss beyond two standard errors fails; to hold, a loss of more than `margin` must be ruled out as surely."""
    if difference.sign < 0:
        return FAILS
    excluded = difference.error is not None and difference.mean - SIGMAS * difference.error > -margin
    return HOLDS if excluded else OPEN


def _room(verdict: str, margin: float) -> str:
    return f" A loss of {100 * margin:g} points is not ruled out." if verdict == OPEN else ""


def _better(results: Results, one: str, other: str, claim: str, paper: str) -> Claim | None:
    difference = success_difference(results.get(one, {}), results.get(other, {}))
    if difference is None:
        return None
    verdict = {1: HOLDS, 0: OPEN, -1: FAILS}[difference.sign]
    why = {HOLDS: "", OPEN: ", within two standard errors of none", FAILS: ", so the other way round"}[verdict]
    return Claim(claim, paper, verdict, f"task success of {one} less {other}: {shown(difference)}{why}.{_greedily(results, one, other)}")


def _greedily(results: Results, one: str, other: str) -> str:
    difference = success_difference(greedy(results.get(one, {})), greedy(results.get(other, {})))
    return "" if difference is None else f" Evaluated without sampling: {shown(difference)}."


def _tau2(one: str, other: str) -> str:
    return f"{published.IN_DOMAIN[one][0]} against {published.IN_DOMAIN[other][0]} on tau2; worse than SFT on SWE"


def _ablated(name: str) -> str:
    return f"{published.ABLATION_TAU2['pivotrl']} against {published.ABLATION_TAU2[name]} on tau2"


def _sft_loses(results: Results) -> Claim | None:
    change = skill_change(results.get("sft", {}), results.get("base", {}))
    if change is None:
        return None
    verdict = {-1: HOLDS, 0: OPEN, 1: FAILS}[change.sign]
    paper = f"{published.OUT_OF_DOMAIN_CHANGE['sft'].change} points over eight benchmarks"
    gentle = skill_change(results.get("sft_gentle", {}), results.get("base", {}))
    beside = f" At a third of its learning rate: {shown(gentle)}." if gentle is not None else ""
    return Claim("Out of domain, SFT loses", paper, verdict, f"mean change over ten skills: {shown(change)}.{beside}")


def _pivotrl_keeps(results: Results) -> Claim | None:
    change = skill_change(results.get("pivotrl", {}), results.get("base", {}))
    sft = skill_change(results.get("sft", {}), results.get("base", {}))
    if change is None:
        return None
    known = mean([mean(list(result.skills.values())) for result in results["base"].values()])
    verdict = OPEN if known <= SKILL_MARGIN else _no_worse(change, SKILL_MARGIN)
    room = _room(verdict, SKILL_MARGIN) if known > SKILL_MARGIN else " pi_0 has next to nothing to lose."
    beside = f" SFT: {shown(sft)}." if sft is not None else ""
    if verdict == HOLDS and sft is not None and sft.mean >= change.mean:
        beside += " SFT loses no more here, so this does not tell the two apart."
    paper = f"{published.OUT_OF_DOMAIN_CHANGE['pivotrl'].change} points over eight benchmarks"
    return Claim("Out of domain, PivotRL loses nothing", paper, verdict, f"mean change over ten skills: {shown(change)}.{room}{beside}")


def _as_good_as_e2e(results: Results) -> Claim | None:
    difference = success_difference(results.get("pivotrl", {}), results.get("e2e", {}))
    if difference is None:
        return None
    verdict = _no_worse(difference, TASK_MARGIN)
    gain = success_difference(results["e2e"], results.get("base", {}))
    if gain is None or gain.sign <= 0:
        verdict, rest = OPEN, " End-to-end RL is not known to gain over pi_0, so being as good says little."
    else:
        rest = _room(verdict, TASK_MARGIN)
    rest += _greedily(results, "pivotrl", "e2e")
    return Claim(
        "PivotRL ends as good as end-to-end RL",
        "competitive accuracy on SWE",
        verdict,
        f"task success of pivotrl less e2e, each at its own end of training: {shown(difference)}.{rest}",
    )


def _cheaper(results: Results) -> list[Claim]:
    if not (results.get("pivotrl") and results.get("e2e")):
        return []
    found = equal_success(results["pivotrl"], results["e2e"])
    wanted = (
        ("{} times fewer rollout turns", "ratio", published.TURNS_RATIO, "pivotrl", "e2e", "turns"),
        ("{} times less time", "wall_ratio", published.WALL_RATIO, "pivotrl_wall_s", "e2e_wall_s", "seconds"),
    )
    claims = []
    for text, key, paper, ours, theirs, unit in wanted:
        claim = f"PivotRL reaches end-to-end RL's success with {text.format(f'{paper.value:g}')}"
        ratio = found[key]
        if not isinstance(ratio, float):
            claims.append(Claim(claim, paper.times, OPEN, f"{found['reason']}."))
            continue
        verdict = HOLDS if ratio >= paper.value else FAILS
        rest = " PivotRL needs less, but not by that factor." if ratio > 1 else " PivotRL does not need less here."
        paid = f" ({found['profiling']:,.0f} of them to profile)" if unit == "turns" else ""
        sentence = (
            f"to {found['level']:.3f} task success PivotRL takes {found[ours]:,.0f} {unit}{paid}, end-to-end RL {found[theirs]:,.0f}: "
            f"a factor of {ratio:.2f}.{'' if verdict == HOLDS else rest}"
        )
        claims.append(Claim(claim, paper.times, verdict, sentence))
    return claims


def _dead_turns(results: Results) -> Claim | None:
    shares = [result.counts["dead_turn_share"] for result in results.get("pivotrl", {}).values()]
    shares = [share for share in shares if share is not None]
    if not shares:
        return None
    found = mean(shares)
    return Claim(
        "Most random turns carry no signal",
        f"{100 * published.DEAD_TURN_SHARE.value:.0f} % ({published.DEAD_TURN_SHARE.mark})",
        HOLDS if found > 0.5 else FAILS,
        f"{100 * found:.1f} % of profiled turns have equal rewards in all samples.",
    )


def _deviation(results: Results) -> Claim | None:
    """Pivots keep the deviation of rewards above that of random turns: by seed, the mean over all of training."""
    one, other = results.get("pivotrl", {}), results.get("random", {})
    seeds = sorted(seed for seed in set(one) & set(other) if one[seed].deviations and other[seed].deviations)
    if not seeds:
        return None
    means = [(mean(one[seed].deviations), mean(other[seed].deviations)) for seed in seeds]
    more = all(pivots > random for pivots, random in means)
    fewer = all(pivots <= random for pivots, random in means)
    verdict = HOLDS if more else FAILS if fewer else OPEN
    numbers = ", ".join(f"{pivots:.3f} against {random:.3f}" for pivots, random in means)
    return Claim(
        "Pivots give batches more reward deviation than random turns",
        "its Figure 3",
        verdict,
        f"mean over training, pivotrl against random, seed by seed: {numbers}.",
    )
