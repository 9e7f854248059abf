"""A process that joins an isolation of the model on paper: `python fake_worker.py OUT CONFLICTS [DELAY]`.

Prints how many measurements it made. DELAY are seconds that every measurement takes longer.
"""

from __future__ import annotations

import sys
import time

from fake_model import FakeModel, fake_conflicts, isolated

from av_lens.isolation.measuring import store


def main() -> None:
    out, n, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    made = [0]
    timed = store.Store._timed

    def slowly(self, compute):
        made[0] += 1
        time.sleep(delay)
        return timed(self, compute)

    store.Store._timed = slowly
    isolated(FakeModel(), fake_conflicts(n, n_classes=6), s=0.1, out=out, join=True, quick=True, named_only=True)
    print(made[0])


if __name__ == "__main__":
    main()
