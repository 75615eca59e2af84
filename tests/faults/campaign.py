"""The random campaign: `make campaign TRIALS=500 SEED=7`.

Each trial disturbs one run with one to three random faults, starts it again until it is finished, and compares it with an
undisturbed one bit by bit. A failure is reduced to its shortest list of faults and kept in tests/faults/regressions, which
the tests replay.
"""

from __future__ import annotations

import argparse
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from fault_figures import record_figure
from plans import Plan, Wrong, carry_out, draw, shrink
from server import ForkServer
from trials import Trials

REGRESSIONS = Path(__file__).parent / "regressions"
COUNTED = ("mismatch", "torn accepted", "orphan", "false success", "hang", "unsound", "unfinished", "exit code")


def main() -> int:
    """Run the campaign and return 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=None, help="printed; the same seed draws the same trials")
    parser.add_argument("--exact", type=float, default=0.0, metavar="SHARE", help="share of trials that change the number of ranks")
    options = parser.parse_args()
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    torch.set_num_threads(1)
    say(f"{options.trials} trials, seed {seed}")
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    try:
        with ForkServer() as server:
            wrong = campaign(Trials(server, folder), options.trials, seed, options.exact)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if wrong else 0


def campaign(trials: Trials, num_trials: int, seed: int, exact: float) -> Counter[str]:
    """Carry out `num_trials` plans drawn with `seed`; return how often each kind of failure came."""
    rng, wrong = random.Random(seed), Counter[str]()
    began, num_starts, num_faults, worst = time.monotonic(), 0, 0, 0.0
    for number in range(1, num_trials + 1):
        plan = draw(rng, exact=rng.random() < exact)
        num_faults += len(plan.faults)
        try:
            outcome = carry_out(plan, trials)
            num_starts, worst = num_starts + outcome.starts, max(worst, outcome.notice)
        except Wrong as error:
            wrong[error.kind] += 1
            keep(plan, error, trials, seed, number)
        if number % 10 == 0 or number == num_trials:
            seconds = time.monotonic() - began
            say(
                f"{number} trials, {num_starts} starts, {wrong.total()} failures, {seconds:.0f} s, {seconds / number:.2f} s a trial"
            )
    seconds = time.monotonic() - began
    counts = {f"{kind.replace(' ', '_')}": wrong[kind] for kind in COUNTED}
    say(", ".join(f"{kind}: {wrong[kind]}" for kind in COUNTED))
    part = "random campaign" + (f", {exact:.0%} of the trials with exact sums on changing numbers of ranks" if exact else "")
    record_figure(
        "campaign", part, case=f"seed {seed}", trials=num_trials, passed=num_trials - sum(wrong.values()), seeds=str(seed),
        starts=num_starts, faults=num_faults, seconds=round(seconds), worst_notice_seconds=round(worst, 2), **counts,
    )  # fmt: skip
    return wrong


def keep(plan: Plan, error: Wrong, trials: Trials, seed: int, number: int) -> None:
    """Print a failure, reduce it, and store the shortest plan."""
    say(f"trial {number} (seed {seed}): {error}\n{plan}")

    def fails(candidate: Plan) -> bool:
        try:
            carry_out(candidate, trials)
        except Wrong as found:
            return found.kind == error.kind
        return False

    shortest = shrink(plan, fails)
    path = REGRESSIONS / f"seed-{seed}-trial-{number}.json"
    shortest.save(path)
    say(f"reduced to {shortest}\nkept in {path}")


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(f"campaign: {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
