"""Passes counted from outside of the trainer, and the checks that every integration stands."""

import torch

OF_A_RESULT = ("loss", "phase", "was_predicted", "prediction_error", "confidence", "gradient_norm")


class Passes:
    """Counts forward passes with gradients and without, and backward passes, of one layer."""

    def __init__(self, layer):
        self.forward = self.probes = self.backward = 0
        layer.register_forward_hook(self._count)
        layer.weight.register_hook(self._count_backward)

    def _count(self, *_):
        self.forward += torch.is_grad_enabled()
        self.probes += not torch.is_grad_enabled()

    def _count_backward(self, _):
        self.backward += 1

    def check(self, trainer, steps, parts=1):
        """Every step that was not predicted went backward once for each part, the others never."""
        seen = trainer.statistics()
        assert seen.steps == steps
        assert 0 < seen.predicted_steps < steps
        assert self.backward == self.forward == parts * (steps - seen.predicted_steps)
        assert self.backward == parts * seen.backward_passes


def figures(result):
    """What of a step has to be the same in a resumed run, to the last bit."""
    return [repr(getattr(result, name)) for name in OF_A_RESULT]


def same_weights(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
