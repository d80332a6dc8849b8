"""Measures of how concepts are routed to experts, on both sides of their thresholds."""

import pytest
import torch

from rocr import Concept
from rocr.edit.routing import FEW_TOKENS, MAIN_SHARE, measure_routing
from rocr.keys.routed import Routing
from rocr.statistics.statistics import MixtureMoments

CONCEPTS = [Concept("Ada Byron", "a gardener"), Concept("Blaise Pascal", "a key")]
TOKENS = 10_000
SHARED = 2
"""The block that every token of the statistics was routed to."""


def measured(weights, counts, seen):
    """The routing of one key of each concept, read in 4 prompts, to 3 blocks."""
    moments = MixtureMoments((torch.eye(2),) * 3, torch.tensor([*seen, TOKENS]))
    routing = Routing((0, 1, SHARED), torch.tensor(weights), torch.tensor(counts), torch.tensor([4, 4]))
    return measure_routing(1, routing, [0, 1], CONCEPTS, moments, TOKENS)


@pytest.mark.parametrize(("seen", "named"), [(FEW_TOKENS - 1, ["Ada Byron"]), (FEW_TOKENS, [])])
def test_an_expert_counts_as_covered_from_a_number_of_tokens(seen, named):
    found = measured([[1.0, 0.0, 9.0], [0.0, 1.0, 9.0]], [[4, 0, 4], [0, 4, 4]], [seen, 5_000])
    assert found.uncovered == named
    assert found.tokens == [seen, 5_000, TOKENS]


@pytest.mark.parametrize(("more", "named"), [(-0.01, []), (0.01, ["Ada Byron"])])
def test_a_small_share_of_the_weight_does_not_count(more, named):
    share = MAIN_SHARE + more
    found = measured([[share, 1 - share, 9.0], [0.0, 1.0, 9.0]], [[4, 4, 4], [0, 4, 4]], [10, 5_000])
    assert found.uncovered == named


@pytest.mark.parametrize(("count", "agreement"), [(4, 1.0), (3, 0.25)])
def test_templates_agree_on_an_expert_that_all_are_routed_to(count, agreement):
    """Shared experts do not count: all tokens are routed to them."""
    found = measured([[0.75, 0.25, 9.0], [0.0, 0.0, 9.0]], [[count, 4, 4], [0, 0, 4]], [5_000, 5_000])
    assert found.agreement == pytest.approx([agreement, 1.0])
