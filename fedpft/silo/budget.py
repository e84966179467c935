"""What a silo has spent of its samples' privacy: work/privacy.json, over rounds, restarts and federations.

    {"noise": {run: z}, "spent": [{"run": ..., "round": ..., "rate": q, "noise": z, "count": steps}, ...]}

A round is on record before anything that follows from it leaves the process. One that was trained and lost, in a crash,
is spent all the same; nobody ever gets a refund.
"""

import logging
import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fedpft import atomic
from fedpft.config import LimitsSection, PrivacySection, RoundSettings
from fedpft.data.batches import round_window
from fedpft.errors import CheckpointError, ConfigError, PrivacySpent
from fedpft.gradients import Private, sampling_rate
from fedpft.privacy.accounting import Steps, epsilon, noise_for
from fedpft.training import epochs_of

log = logging.getLogger(__name__)

FILE = "privacy.json"
SLACK = 1e-6  # of epsilon: what rounding makes of a sum that came out even


class _Spent(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    round: int
    rate: float
    noise: float
    count: int

    @property
    def steps(self) -> Steps:
        return Steps(self.rate, self.noise, self.count)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    noise: dict[str, float] = {}
    spent: list[_Spent] = []


class Budget:
    """Of one work directory, which one process has at a time.

    allowed: at most, over all federations.
    """

    def __init__(self, work: Path, allowed: PrivacySection, samples: int, run: str = "") -> None:
        """Args:
            samples: that there are.
            run: the federation that is taken part in.

        Raises:
            ConfigError: delta is no promise for so many samples.
            CheckpointError: privacy.json cannot be read.
        """
        if allowed.delta * samples >= 1.0:
            raise ConfigError(
                f"privacy.delta: {allowed.delta:g} is no less than 1 / {samples}, which lets whole samples out",
                f"set it to {1 / (10 * samples):.0e} or less",
            )
        self.allowed, self._samples, self._run, self._path = allowed, samples, run, work / FILE
        self._record = _read(self._path)

    @property
    def spent(self) -> float:
        """Epsilon so far, at the delta that is allowed."""
        return epsilon(self._steps, self.allowed.delta)

    def plan(self, settings: RoundSettings, limits: LimitsSection) -> Steps:
        """A round of the federation: with the noise that lets all of its rounds fit into what is left when it begins.

        Raises:
            PrivacySpent: no noise does.
        """
        if (planned := self.planned(settings, limits)) is not None:
            return planned
        (rate, count), rounds = self._round(settings, limits), settings.training.rounds
        noise = noise_for(self.allowed.epsilon, self.allowed.delta, self._steps, rate, count * rounds)
        log.info(
            "privacy: epsilon %g at delta %g, %d rounds of %d steps: noise of %.3f clip norms; %.2f spent before",
            *(self.allowed.epsilon, self.allowed.delta, rounds, count, noise, self.spent),
        )
        self._write(self._record.model_copy(update={"noise": {**self._record.noise, self._run: noise}}))
        return Steps(rate, noise, count)

    def planned(self, settings: RoundSettings, limits: LimitsSection) -> Steps | None:
        """The same, if it was planned before."""
        noise = self._record.noise.get(self._run)
        if noise is None:
            return None
        rate, count = self._round(settings, limits)
        return Steps(rate, noise, count)

    def _round(self, settings: RoundSettings, limits: LimitsSection) -> tuple[float, int]:
        """q, and how many steps."""
        training = settings.training
        count = round_window(self._samples, epochs_of(training, limits), 0)[1]
        return sampling_rate(self._samples, training.batch), math.ceil(count / training.batch)

    def private(self, steps: Steps) -> Private:
        """How these steps are trained; PrivacySpent if they would pass what is allowed."""
        if not self._fits(after := self._with(steps)):
            raise PrivacySpent(
                f"privacy: {self.spent:.2f} of epsilon {self.allowed.epsilon:g} is spent, and a round of "
                f"{steps.count} steps would make it {after:.2f}: nothing was trained",
                "raise privacy.epsilon in silo.yaml if your institution may, or leave the federation",
            )
        return Private(self.allowed.clip, steps.noise)

    def spend(self, round: int, steps: Steps) -> None:
        """Puts a round on record, beyond the reach of a power failure."""
        spent = _Spent(run=self._run, round=round, rate=steps.rate, noise=steps.noise, count=steps.count)
        self._write(self._record.model_copy(update={"spent": [*self._record.spent, spent]}))

    def describe(self) -> list[str]:
        """What was spent, by federation, in lines."""
        lines = [f"allowed: epsilon {self.allowed.epsilon:g} at delta {self.allowed.delta:g}"]
        for run in dict.fromkeys(each.run for each in self._record.spent):
            own = [each for each in self._record.spent if each.run == run]
            of_run = epsilon([each.steps for each in own], self.allowed.delta)
            steps = sum(each.count for each in own)
            lines.append(f"federation {run}: {len(own)} rounds, {steps} steps, epsilon {of_run:.2f} by itself")
        return [*lines, f"spent: epsilon {self.spent:.2f}"]

    def rounds_left(self, steps: Steps) -> int:
        """How many more of these rounds fit."""
        least, most = 0, 1

        def fit(rounds: int) -> bool:
            return self._fits(self._with(Steps(steps.rate, steps.noise, steps.count * rounds)))

        while fit(most) and most < 1 << 16:
            least, most = most, 2 * most
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if fit(middle) else (least, middle)
        return least

    @property
    def _steps(self) -> list[Steps]:
        return [each.steps for each in self._record.spent]

    def _with(self, more: Steps) -> float:
        """Epsilon, if these are spent too."""
        return epsilon([*self._steps, more], self.allowed.delta)

    def _fits(self, after: float) -> bool:
        return after <= self.allowed.epsilon * (1.0 + SLACK)

    def _write(self, record: _Record) -> None:
        atomic.write_text(self._path, record.model_dump_json(indent=1))
        self._record = record


def _read(path: Path) -> _Record:
    try:
        return _Record.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return _Record()
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({str(error).splitlines()[0]})",
            "restore it from a backup: without it nobody knows what was spent of the samples' privacy",
        ) from None
