"""A loop of the user's own, from a Python file or module that defines ``build()``.

``build()`` returns model, optimizer, data and loss, as a tuple in this order or as a dictionary:

    def build():
        model = nn.Linear(64, 10)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        data = DataLoader(dataset, batch_size=64, shuffle=True)

        def loss(model, batch):
            x, y = batch
            return F.cross_entropy(model(x), y)

        return model, optimizer, data, loss

- ``data`` is any iterable of batches, gone through again when it ends. A tensor, or a tuple of
  them, is one batch that is the same in every step; None is no data.
- ``loss`` is called as ``loss(model, batch)``, ``loss(batch)`` or ``loss()``, by the number of its
  parameters; a criterion such as ``nn.CrossEntropyLoss()`` or ``F.mse_loss`` on ``model(x)`` and
  ``y`` of a batch ``(x, y)``.
- In a dictionary, ``scheduler`` and ``held_out`` (batches as in ``data``) are optional.
- A run is judged by the mean loss of the first eight batches of ``held_out``, or else of ``data``,
  in ``eval()`` mode.
"""

from __future__ import annotations

import importlib
import random
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hybridcore.cli.common import UserError, blamed
from hybridcore.cli.loops import (
    PARTS,
    Loop,
    Random,
    listed,
    of_parts,
    of_workload,
    set_random_states,
)
from hybridcore.cli.workloads import FASHION, WORKLOADS

STEPS = 1000


@dataclass(frozen=True, slots=True)
class Source:
    """Where loops come from: a file's text, a module's name, or a built-in workload's.

    It can be sent to another process or machine; the text of a file goes with it.

    Attributes
    ----------
    name : str
        What the user called it.
    text : str or None
        Content of the file.
    steps : int
        Steps of a run if the user names none.
    """

    name: str
    text: str | None = None
    steps: int = STEPS

    @classmethod
    def of(cls, target: str) -> Source:
        """Find what `target` names, without running it yet.

        Raises
        ------
        UserError
            If there is no such thing.
        """
        if target == "fashion" and not FASHION.is_dir():
            raise UserError(
                f"fashion needs {FASHION}: install Debian's package dataset-fashion-mnist, or take "
                "digits"
            )
        if target in WORKLOADS:
            return cls(target, steps=WORKLOADS[target].steps)
        path = Path(target)
        if path.is_file():
            try:
                return cls(target, path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{target} cannot be read as Python: {error}") from error
        if path.is_dir():
            raise UserError(f"{target} is a folder: name a Python file that defines build()")
        if path.suffix == ".py" or len(path.parts) > 1:
            raise UserError(f"{target}: no such file, name a Python file that defines build()")
        if not all(part.isidentifier() for part in target.split(".")):
            raise UserError(f"{target} is neither a file nor a module: name one with build()")
        return cls(target)

    def build(self, seed: int, steps: int) -> Loop:
        """Build the loop for `seed`; with the same seed it is the same, batch for batch.

        Raises
        ------
        UserError
            If ``build()`` is missing, fails, or returns what cannot be trained.
        """
        outside = Random()
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            if self.text is None and self.name in WORKLOADS:
                return of_workload(self.name, seed, steps)
            build = getattr(self._module(), "build", None)
            if not callable(build):
                raise UserError(
                    f"{self.name} defines no build(): add a function that returns {listed(PARTS)}"
                )
            with blamed(self.name, "build()"):
                parts = build()
            return of_parts(self.name, parts)
        finally:
            set_random_states(outside.states)

    def _module(self) -> types.ModuleType:
        if self.text is None:
            # As for `python -m`: modules of the present folder can be named.
            if "" not in sys.path:
                sys.path.insert(0, "")
            try:
                with blamed(self.name, "import"):
                    return importlib.import_module(self.name)
            except ModuleNotFoundError as error:
                raise UserError(
                    f"there is no file or module {self.name}: name a Python file that defines "
                    "build()"
                ) from error
        name = "_hybridcore_own"
        module = sys.modules.get(name)
        if module is not None and module.__dict__.get("__text__") == self.text:
            return module
        module = types.ModuleType(name)
        module.__file__, module.__dict__["__text__"] = self.name, self.text
        folder = str(Path(self.name).absolute().parent)
        if folder not in sys.path:
            sys.path.insert(0, folder)
        # Where dataclasses and pickle look it up.
        sys.modules[name] = module
        try:
            with blamed(self.name, "import"):
                exec(compile(self.text, self.name, "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
        return module
