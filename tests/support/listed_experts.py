"""A mixture of experts as a list of modules."""

from torch import nn


class ListedExperts(nn.Module):
    """A mixture as code beside transformers may have it: a list of modules, and one that every token runs through."""

    def __init__(self, width: int, inner: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(self._expert(width, inner) for _ in range(experts))
        self.always = self._expert(width, 2 * inner)

    @staticmethod
    def _expert(width: int, inner: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, states):
        flat = states.view(-1, states.shape[-1])
        gates, chosen = self.router(flat).softmax(dim=-1).topk(2, dim=-1)
        output = 0.5 * self.always(flat)
        for number, expert in enumerate(self.experts):
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            output[tokens] += gates[tokens, place, None] * expert(flat[tokens])
        return output.view_as(states)
