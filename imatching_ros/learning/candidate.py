"""The copy of the matcher that trains."""

from __future__ import annotations

import copy

import torch
from torch import nn, Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .options import LearnerOptions

_ADAM = ('step', 'exp_avg', 'exp_avg_sq')


class Candidate:
    """A copy of a matcher with its optimiser, and its average over the steps, which is judged."""

    def __init__(self, matcher: nn.Module, options: LearnerOptions, device: torch.device) -> None:
        self.matcher = copy.deepcopy(matcher).to(device)
        self.optimiser = torch.optim.Adam(self.matcher.parameters(), lr=options.rate)
        averaging = get_ema_multi_avg_fn(options.average)
        self.average = AveragedModel(self.matcher, multi_avg_fn=averaging)

    def descend(self, loss: Tensor, rate: float, clip: float) -> bool:
        """
        Take a step down the gradient of a loss, at a learning rate, its norm ``clip`` at most.

        Returns whether the gradient was finite; where it was not, no step is taken.
        """
        for group in self.optimiser.param_groups:
            group['lr'] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.matcher.parameters(), clip)
        if not bool(norm.isfinite()):
            return False
        self.optimiser.step()
        self.average.update_parameters(self.matcher)
        return True

    def tensors(self) -> dict[str, Tensor]:
        """Return what :meth:`load` needs to go on, by name."""
        parts = ('candidate', self.matcher), ('average', self.average)
        tensors = {
            f'{part}.{name}': tensor
            for part, module in parts for name, tensor in module.state_dict().items()
        }
        for name, parameter in self.matcher.named_parameters():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f'adam.{key}.{name}'] = value
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from :meth:`tensors`; RuntimeError or KeyError where they do not fit."""
        for part, module in (('candidate.', self.matcher), ('average.', self.average)):
            module.load_state_dict(
                {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
            )
        for name, parameter in self.matcher.named_parameters():
            state = {
                key: tensors[f'adam.{key}.{name}']
                for key in _ADAM if f'adam.{key}.{name}' in tensors
            }
            if state:
                for key in ('exp_avg', 'exp_avg_sq'):
                    # In the parameter's own layout
                    state[key] = torch.zeros_like(parameter).copy_(state[key])
                self.optimiser.state[parameter] = state


def interpolated(first: nn.Module, second: nn.Module, share: float) -> nn.Module:
    """Return a copy of the first module whose weights lie a share of the way to the second's."""
    between = copy.deepcopy(first)
    ends = zip(between.state_dict().values(), second.state_dict().values(), strict=True)
    with torch.no_grad():
        for mine, other in ends:
            if mine.is_floating_point():
                mine.lerp_(other.to(mine), share)
    return between
