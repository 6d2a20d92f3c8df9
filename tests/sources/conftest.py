"""What the tests of all sources share."""

from collections import Counter
from collections.abc import Callable

import pytest

from pivotrl.candidates import cut
from pivotrl.sources import Source
from pivotrl.types import Reject, Trajectory


@pytest.fixture
def read_all() -> Callable[[Source], tuple[Counter, list[Trajectory]]]:
    """Reads and cuts a whole source: counts of trajectories, candidates and rejects by reason, and the trajectories."""

    def read(source: Source) -> tuple[Counter, list[Trajectory]]:
        counts, trajectories = Counter(), []
        for ref in source.refs():
            answer = ref if isinstance(ref, Reject) else source.read(ref.key)
            if isinstance(answer, Reject):
                counts[answer.reason] += 1
                continue
            candidates, rejects = cut(answer)
            counts.update({"trajectories": 1, "candidates": len(candidates)})
            counts.update(reject.reason for reject in rejects)
            trajectories.append(answer)
        return counts, trajectories

    return read
