"""The short tour: the paper's swiss roll and real handwritten digits, in under two minutes on two cores."""

from __future__ import annotations

from examples import digits, swiss_roll
from examples.report import arguments

if __name__ == "__main__":
    args = arguments(__doc__)
    num_steps = 100 if args.small else None
    swiss_roll.run(["short"], num_steps=num_steps, num_test=2_000, figures=args.figures, progress=args.progress)
    digits.run(num_steps=num_steps or 1_500, figures=args.figures, progress=args.progress)
