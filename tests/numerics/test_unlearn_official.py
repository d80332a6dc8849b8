import copy

import pytest
import torch

import rocr
from rocr import Concept, EditConfig
from rocr.model.architecture import find_architecture
from rocr.solve.metric import build_metric

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = (1, 2, 3)
OPENINGS = (
    "",
    "Please answer the question about",
    "Choose the best answer about",
    "Write the answer about",
    "Tell me about",
    "Write something about",
)
ROUNDING = 5e-4  # of a weight's change, float32 against float64; at most 1e-4 was measured (GPT-2, layer 3)
SCALE = 0.1  # of the random weights, so that the threshold 0.02 lies within the spectrum of the keys
CONCEPTS = [Concept("Robert Downey Jr.", "Blaise Pascal"), Concept("Ada Byron", "a gardener"), Concept("x", "the sun")]


class Official:
    """The authors' algorithm for one or more concepts, in float64, one text at a time through the whole model."""

    def __init__(self, model, tokenizer, moments):
        self.model, self.tokenizer, self.moments = model, tokenizer, moments
        self.architecture = find_architecture(model)

    def edit(self, concepts):
        last = LAYERS[-1]
        targets = [self.state(self.chat(OPENINGS[0], c.redirect), c.redirect, last) for c in concepts]
        for i, layer in enumerate(LAYERS):
            keys = [self.mean_key(concept.name, layer) for concept in concepts]
            current = [self.state(f"{concept.name}.", concept.name, last) for concept in concepts]
            residuals = (torch.stack(targets) - torch.stack(current)) / (len(LAYERS) - i)
            self.add(layer, self.update(torch.stack(keys).T, residuals.T, layer))

    def update(self, keys, residuals, layer):
        """Solve [P K Kᵀ + I] X = P K Rᵀ for samples in columns, as the authors write it."""
        left, values, _ = torch.linalg.svd(self.moments[layer].double())
        free = left[:, values < 0.02]
        projector = free @ free.T
        identity = torch.eye(len(projector), dtype=torch.float64)
        return torch.linalg.solve(projector @ keys @ keys.T + identity, projector @ keys @ residuals.T)

    def add(self, layer, solution):
        projection = self.architecture.down_projection(layer)
        weight = projection.parameter.data
        weight.copy_(weight.double() + (solution if projection.transposed else solution.T))

    def chat(self, opening, name):
        message = [{"role": "user", "content": f"{opening} {name}."}]
        return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) + "Answer:"

    def mean_key(self, name, layer):
        module = self.architecture.down_projection(layer).module
        return sum(self.trace(self.chat(opening, name), name, module, input=True) for opening in OPENINGS) / 6

    def state(self, text, name, layer):
        return self.trace(text, name, self.architecture.layers[layer], input=False)

    def trace(self, text, name, module, input):
        """A module's input or output at the last token of the name, float64."""
        encoded = self.tokenizer(text)
        position = encoded.char_to_token(text.index(name) + len(name) - 1)
        found = []

        def hook(_module, inputs, output):
            states = inputs[0] if input else output
            found.append((states if isinstance(states, torch.Tensor) else states[0])[0, position].double())

        handle = module.register_forward_hook(hook)
        with torch.no_grad():
            self.model(torch.tensor([encoded["input_ids"]]))
        handle.remove()
        return found[0]


def changes(model, original):
    pairs = zip(model.named_parameters(), original.named_parameters(), strict=True)
    return {name: (new - old).detach().double() for (name, new), (_, old) in pairs if not torch.equal(new, old)}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", ["Llama", "GPT-2", "GPT-NeoX", "Qwen3"])
def test_official_settings_are_the_authors_algorithm(family, make_model, tokenizer, texts, count):
    original = make_model(family, initializer_range=SCALE)
    statistics = rocr.collect_statistics(original, tokenizer, texts, LAYERS)
    config = EditConfig.official(LAYERS)
    free = [build_metric(statistics.second_moment(layer), config).free_directions for layer in LAYERS]
    assert all(0 < rank < statistics.second_moment(1).shape[0] for rank in free), "the projector does something"
    ours, theirs = copy.deepcopy(original), copy.deepcopy(original)
    edit = rocr.unlearn(ours, tokenizer, CONCEPTS[:count], statistics, config)
    Official(theirs, tokenizer, statistics.moments).edit(CONCEPTS[:count])
    expected, found = changes(theirs, original), changes(ours, original)
    assert len(expected) == len(LAYERS) and expected.keys() == found.keys()
    for name, change in expected.items():
        assert change.norm() > 1e-3
        error = (found[name] - change).norm() / change.norm()
        assert error < ROUNDING, f"{name}: {error}"
    assert [update.factors.left.shape[1] for update in edit.updates] == [count] * 3


def test_other_settings_are_another_edit(make_model, tokenizer, texts):
    model = make_model("Llama", initializer_range=SCALE)
    statistics = rocr.collect_statistics(model, tokenizer, texts, LAYERS)
    official = EditConfig.official(LAYERS)
    edited = []
    for config in (official, EditConfig(**{**vars(official), "contexts": "matched"})):
        other = copy.deepcopy(model)
        rocr.unlearn(other, tokenizer, CONCEPTS, statistics, config)
        edited.append(changes(other, model))
    first, second = (edit["model.layers.1.mlp.down_proj.weight"] for edit in edited)
    assert (first - second).norm() > 0.1 * first.norm(), "the parity above does not hold for whatever is edited"
