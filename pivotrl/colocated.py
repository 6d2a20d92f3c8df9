"""Colocated mode (rollout.colocated): the policy and its rollout servers take turns on the same GPUs."""

from typing import Protocol


class OffloadablePolicy(Protocol):
    """The part of `Policy` that makes room. Every process calls both; a second call of one does nothing."""

    def offload(self) -> None: ...

    def reload(self) -> None: ...


class SleepingService(Protocol):
    """The part of `RolloutService` that makes room."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class Turns:
    """Whose turn it is: the servers are awake only while the policy is offloaded. Every process calls `sample` and `train`;
    `service` exists on the main process only. Where nothing is `shared` nothing happens."""

    def __init__(self, policy: OffloadablePolicy, service: SleepingService | None, *, shared: bool):
        self.policy, self.service, self.shared = policy, service, shared
        self._asleep = False

    def sample(self, *, pushing: bool = False) -> None:
        """The servers' turn; a weight sync that follows at once (`pushing`) wakes them itself."""
        if not self.shared:
            return
        self.policy.offload()  # returns when all processes have made room
        if self._asleep and not pushing and self.service is not None:
            self.service.wake()
        self._asleep = False

    def train(self) -> None:
        """The policy's turn."""
        if not self.shared:
            return
        if not self._asleep and self.service is not None:
            self.service.sleep()
        self._asleep = True
        self.policy.reload()  # begins when all processes are here, so when the servers sleep
