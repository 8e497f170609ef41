"""The catalogue of mutants: bugs that a person might put into the alignment code, one line of text each.

`make mutants` injects them one at a time and sees a fast test fail (mutate.py). The bugs of C60 (mutants_c60.py) are
those that were once put into a small PPO, of which most still made its reward rise.
"""

from __future__ import annotations

from mutant import Mutant
from mutants_algorithms import ALGORITHMS
from mutants_c60 import C60
from mutants_objectives import OBJECTIVES
from mutants_rl import RL
from mutants_rl_data import RL_DATA
from mutants_text import TEXT

CATALOGUE: tuple[Mutant, ...] = (*C60, *RL, *ALGORITHMS, *RL_DATA, *OBJECTIVES, *TEXT)
