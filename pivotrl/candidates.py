"""From trajectories to candidates: split by task first, then cut every trajectory at every assistant turn."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from pivotrl.config import DomainConfig
from pivotrl.records import Journal, write_json, write_jsonl
from pivotrl.sources import Source, WarmupSource
from pivotrl.types import Action, Candidate, Record, Reject, Split, TaskRef, Trajectory


def assign_splits(refs: Sequence[TaskRef], domain: DomainConfig, *, seed: int) -> list[TaskRef]:
    """Give every task one split, in the hash order of its id; refs of tasks that no split needs are left out.

    Counts are tasks. Growing `num_train_tasks` moves no task. A new task can only push others to a later split (heldout ->
    warmup -> train -> unused), at most one per boundary, so a task that was ever trained on never becomes held out.
    """

    def place(task_id: str) -> str:
        return hashlib.sha256(f"{seed}:{task_id}".encode()).hexdigest()

    reserved = {ref.task_id for ref in refs if ref.split == "heldout"}
    free = sorted({ref.task_id for ref in refs} - reserved, key=place)
    heldout = sorted(reserved, key=place)[: domain.num_heldout_tasks]
    first_warmup = domain.num_heldout_tasks - len(heldout)
    first_train = first_warmup + domain.num_warmup_tasks
    end = None if domain.num_train_tasks is None else first_train + domain.num_train_tasks
    split_of: dict[str, Split] = dict.fromkeys(heldout + free[:first_warmup], "heldout")
    split_of |= dict.fromkeys(free[first_warmup:first_train], "warmup")
    split_of |= dict.fromkeys(free[first_train:end], "train")
    return [msgspec.structs.replace(ref, split=split_of[ref.task_id]) for ref in refs if ref.task_id in split_of]


def tools_key(tools: Sequence[dict[str, Any]]) -> str:
    """The name under which tools.json keeps these schemas; the empty list has one too, so every look-up succeeds."""
    canonical = json.dumps(list(tools), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def load_tools(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The tool schemas beside the candidates: {Candidate.tools: [schemas]}.

    Raises:
        FileNotFoundError: no tools.json in `folder`; names the recipe that writes it.
    """
    path = Path(folder) / "tools.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: run recipes/extract_candidates.py first")
    return json.loads(path.read_text(encoding="utf-8"))


def cut(trajectory: Trajectory) -> tuple[list[Candidate], list[Reject]]:
    """One candidate per assistant turn; turns that no policy could or should imitate become rejects.

    Two keys of the trajectory's state steer it: `only_last_turn` (rows that were cut before) and `skip_turns`
    ({"<turn>": reason}, turns that the source knows to be unfit, such as a query that failed).
    """
    positions = [i for i, message in enumerate(trajectory.messages) if message.role == "assistant"]
    actions = tuple(Action.from_message(trajectory.messages[i]) for i in positions)
    first = len(positions) - 1 if trajectory.state.get("only_last_turn") else 0
    key = tools_key(trajectory.tools)
    candidates, rejects = [], []
    for turn in range(max(first, 0), len(positions)):
        where = f"{trajectory.id}:{turn}"
        if fault := _fault(trajectory, turn, position=positions[turn], action=actions[turn]):
            rejects.append(Reject(where=where, reason=fault[0], detail=fault[1]))
            continue
        candidates.append(
            Candidate(
                id=where,
                trajectory_id=trajectory.id,
                task_id=trajectory.task_id,
                domain=trajectory.domain,
                turn=turn,
                history=trajectory.messages[: positions[turn]],
                expert=actions[turn],
                future=actions[turn + 1 :],
                tools=key,
                state=trajectory.state,
            )
        )
    return candidates, rejects


def _fault(trajectory: Trajectory, turn: int, *, position: int, action: Action) -> tuple[str, str] | None:
    """(reason, detail) why this turn is no candidate."""
    if reason := trajectory.state.get("skip_turns", {}).get(str(turn)):
        return reason, ""
    if position == 0:
        return "empty_history", "the trajectory begins with an assistant turn"
    if not action.tool_calls and not action.content.strip():
        return "empty_action", "neither content nor a tool call"
    known = {schema.get("function", schema)["name"] for schema in trajectory.tools}
    unknown = [call.name for call in action.tool_calls if call.name not in known]
    if known and unknown:
        return "unknown_tool", f"{unknown[0]!r} is not one of {', '.join(sorted(known))}"
    return None


class _Read(Record):
    """One line of the journal: what the source answered for one key."""

    key: str
    trajectory: Trajectory | None = None
    reject: Reject | None = None


def extract(source: Source, domain: DomainConfig, *, folder: Path, seed: int) -> dict[str, Any]:
    """Run the stage: read every split task's trajectories and write the candidates folder whole.

    Writes trajectories.jsonl (all splits), candidates.jsonl (train), heldout.jsonl, tools.json and rejects.jsonl. Killed
    at any moment and started again it continues, and the files are byte for byte those of an undisturbed run.

    Returns:
        Counts: trajectories (all and per split), candidates, heldout_candidates, rejects {reason: number}.

    Raises:
        ValueError: not one train candidate came out; says how many inputs were rejected for which reason. Or
            domain.warmup_overlooked is set for a source that records its trajectories and does not make them.
    """
    folder = Path(folder)
    if domain.warmup_overlooked > 0 and not isinstance(source, WarmupSource):
        raise ValueError(f"domain.warmup_overlooked={domain.warmup_overlooked}: source {domain.source!r} reads recorded runs; set it to 0")
    listed = source.refs()
    rejects = [ref for ref in listed if isinstance(ref, Reject)]
    refs = assign_splits([ref for ref in listed if isinstance(ref, TaskRef)], domain, seed=seed)
    journal_path = folder / "read.journal.jsonl"
    reads = _read_all(source, refs, journal_path)
    rejects += [read.reject for read in reads if read.reject is not None]
    trajectories = [read.trajectory for read in reads if read.trajectory is not None]
    by_split: dict[str, list[Candidate]] = {"train": [], "heldout": []}
    seen: set[str] = set()
    for trajectory in trajectories:
        if trajectory.split not in by_split:
            continue
        candidates, faults = cut(trajectory)
        rejects += faults
        rejects += [Reject(where=c.id, reason="duplicate_id", detail="another candidate has this id") for c in candidates if c.id in seen]
        by_split[trajectory.split] += [c for c in candidates if c.id not in seen]
        seen.update(c.id for c in candidates)
    counts = _counts(trajectories, by_split, rejects)
    write_jsonl(folder / "rejects.jsonl", rejects)
    if not by_split["train"]:
        faults = ", ".join(f"{reason} {number}" for reason, number in counts["rejects"].items()) or "none"
        raise ValueError(
            f"domain {domain.name!r}: no train candidates from {counts['trajectories']} trajectories "
            f"({counts['train_trajectories']} of them train); rejects: {faults} (see {folder / 'rejects.jsonl'})"
        )
    write_json(folder / "tools.json", {tools_key(t.tools): list(t.tools) for t in trajectories})
    write_jsonl(folder / "trajectories.jsonl", trajectories)
    write_jsonl(folder / "heldout.jsonl", by_split["heldout"])
    write_jsonl(folder / "candidates.jsonl", by_split["train"])
    journal_path.unlink()
    return counts


def _read_all(source: Source, refs: Sequence[TaskRef], journal_path: Path) -> list[_Read]:
    """What the source says to every ref, in order, each read once even over several starts."""
    shared: dict[str, tuple[dict[str, Any], ...]] = {}  # one copy of equal schemas, or 10^5 rows do not fit into memory

    def finish(read: _Read, ref: TaskRef) -> _Read:
        if read.trajectory is None:
            return read
        tools = shared.setdefault(tools_key(read.trajectory.tools), read.trajectory.tools)
        return msgspec.structs.replace(read, trajectory=msgspec.structs.replace(read.trajectory, split=ref.split, tools=tools))

    with Journal(journal_path, _Read) as journal:
        done = {read.key: read for read in journal.records}
        for ref in tqdm(refs, desc="reading trajectories", unit="trajectory"):
            if ref.key not in done:
                warmup = ref.split == "warmup" and isinstance(source, WarmupSource)
                answer = source.read_warmup(ref.key) if warmup else source.read(ref.key)
                kind = "reject" if isinstance(answer, Reject) else "trajectory"
                done[ref.key] = finish(_Read(key=ref.key, **{kind: answer}), ref)
                journal.append(done[ref.key])
    return [finish(done[ref.key], ref) for ref in refs]


def _counts(trajectories: Sequence[Trajectory], by_split: dict[str, list[Candidate]], rejects: Sequence[Reject]) -> dict[str, Any]:
    splits = Counter(trajectory.split for trajectory in trajectories)
    return {
        "trajectories": len(trajectories),
        **{f"{split}_trajectories": splits[split] for split in ("warmup", "train", "heldout")},
        "candidates": len(by_split["train"]),
        "heldout_candidates": len(by_split["heldout"]),
        "rejects": dict(sorted(Counter(reject.reason for reject in rejects).items())),
    }
