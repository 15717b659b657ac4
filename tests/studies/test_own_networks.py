"""Networks of users: studied as they are, or refused in one line before anything is trained."""

from __future__ import annotations

import logging
import random
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness import SMALL, configure, plan_of
from rethink_prune import load_model
from rethink_prune.errors import UserError
from rethink_prune.imports import import_object

Study = Callable[..., dict[str, Any]]
PLAIN = """
    import random
    import numpy as np
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes, in_channels=3):
            super().__init__()
            self.stem = nn.Conv2d(in_channels, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.inner = nn.Conv2d(8, 12, 3, padding=1)
            self.head = nn.Linear(12, num_classes)
            self.finish()

        def finish(self): pass

        def features(self, x):
            return torch.relu(self.inner(torch.relu(self.norm(self.stem(x)))))

        def forward(self, x):
            return self.head(self.features(x).mean((2, 3)))
"""


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module with a network that differs from a plain one; return its import path."""
    monkeypatch.chdir(tmp_path)
    written = 0

    def write(text: str) -> str:
        nonlocal written
        written += 1
        name = f"own_{tmp_path.name.replace('-', '_')}_{written}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(PLAIN) + textwrap.dedent(text))
        return f"model.name={name}:Other"

    return write


def weights(entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(entry["stage"]) / "model.safetensors")


# What user code draws, and from where.
DRAWS = {
    "constructor": """
        class Other(Net):
            def finish(self):
                self.scale = float(np.random.rand()) + random.random()
                with torch.no_grad():
                    self.inner.weight.copy_(torch.from_numpy(np.random.standard_normal(self.inner.weight.shape)))
            def forward(self, x):
                return self.scale * super().forward(x)
    """,
    "forward": """
        class Other(Net):
            def forward(self, x):
                noise = np.random.rand() + random.random() if self.training else 1.0
                return noise * super().forward(x)
    """,
}


@pytest.mark.parametrize("where", DRAWS)
def test_one_seed_one_result_whatever_generator_draws(where: str, network: Any, small_study: Study) -> None:
    name = network(DRAWS[where])
    runs = []
    for run in ("one", "two"):
        random.seed(run)  # the state that a process happens to be in
        torch.manual_seed(len(runs))
        runs.append(small_study(name, f"store.root={run}", "arms=[finetune,scratch_e]"))
    for entry in ("finetune", "scratch_e"):
        first, second = (weights(run["arms"][entry]) for run in runs)
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


# What is added to a plain network, and what is said about it.
REFUSED = {
    "in its constructor, draws random numbers that the seed does not reach": """
        class Other(Net):
            def finish(self):
                self.register_buffer("offset", torch.from_numpy(np.random.default_rng().random(3)))
    """,
    "in its forward pass, draws random numbers that the seed does not reach": """
        class Other(Net):
            def forward(self, x):
                return super().forward(x) * float(np.random.default_rng().random())
    """,
    "cannot be trained: list index out of range": """
        class Other(Net):
            def forward(self, x):
                y = super().forward(x)
                return [][0] if self.training else y
    """,
    "in training mode: must give logits of 2 x 10 for 2 images; gave (2, 3)": """
        class Other(Net):
            def forward(self, x):
                y = super().forward(x)
                return y[:, :3] if self.training else y
    """,
    "cannot be trained: element 0 of tensors does not require grad": """
        class Other(Net):
            def forward(self, x):
                return super().forward(x).detach()
    """,
    "_extra_state: is a dict, and a stage holds tensors alone": """
        class Other(Net):
            def get_extra_state(self):
                return {"a": 1}
            def set_extra_state(self, state): pass
    """,
    "scratch arms cannot draw its weights anew": """
        class Other(Net):
            def finish(self):
                self.inner = nn.utils.parametrizations.weight_norm(self.inner)
    """,
    "scratch arms cannot draw inner.weight_g": """
        class Other(Net):
            def finish(self):
                self.inner = nn.utils.weight_norm(self.inner)
    """,
    "name a function that draws every weight of a network anew: model.init=path.to.module:function": """
        class Other(Net):
            def finish(self):
                self.token = nn.Parameter(torch.randn(10))
            def forward(self, x):
                return super().forward(x) + self.token
    """,
    "runs other operations once it has run": """
        class Other(Net):
            def finish(self):
                self.seen = []
            def forward(self, x):
                if self.training:
                    self.seen.append(1)
                return super().forward(x) / (1 + len(self.seen))
    """,
    "in evaluation mode, changes mean, so its logits depend on what it saw before": """
        class Other(Net):
            def finish(self):
                self.register_buffer("mean", torch.zeros(3, 1, 1))
            def forward(self, x):
                self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)).view(3, 1, 1) + 0.1)
                return super().forward(x - self.mean)
    """,
    "its forward was replaced on the instance": """
        class Other(Net):
            def finish(self):
                plain = super().forward
                self.forward = lambda x: 2 * plain(x)
    """,
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_before_training(message: str, network: Any, small_study: Study, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        small_study(network(REFUSED[message]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("store/stages/*")), "nothing was trained"


def test_an_initialiser_of_ones_own_draws_what_has_no_reset_parameters(network: Any, small_study: Study) -> None:
    name = network("""
        class Other(Net):
            def finish(self):
                self.token = nn.Parameter(torch.randn(10))
            def forward(self, x):
                return super().forward(x) + self.token

        def draw(model):
            for module in model.children():
                module.reset_parameters()
            nn.init.normal_(model.token)

        def draw_but_one(model):
            for module in model.children():
                module.reset_parameters()
    """)
    module = name.removeprefix("model.name=").partition(":")[0]
    run = small_study(name, f"model.init={module}:draw", "recipe.lr=1e-12", "recipe.weight_decay=0")
    large, scratch = weights(run["large"]), weights(run["arms"]["scratch_e"])
    assert not torch.allclose(large["token"], scratch["token"])
    with pytest.raises(UserError, match="scratch arms cannot draw token anew"):
        small_study(name, f"model.init={module}:draw_but_one")


def test_the_key_covers_the_initialiser(network: Any, tmp_path: Path) -> None:
    name = network("class Other(Net): pass")
    (tmp_path / "drawn_so.py").write_text("def draw(model):\n    [m.reset_parameters() for m in model.children()]\n")
    assert plan_of(configure(*SMALL, name, "model.init=drawn_so:draw"))
    with pytest.raises(UserError, match=r"model\.init=drawn_so:draw_not: drawn_so has no draw_not"):
        plan_of(configure(*SMALL, name, "model.init=drawn_so:draw_not"))


FROZEN = """
    class Other(Net):
        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self
        def forward(self, x):
            x = torch.relu(self.norm(self.stem(x)))
            left, right = x[:, :3], x[:, 3:]
            return self.head(torch.relu(self.inner(torch.cat([right, left], 1))).mean((2, 3)))
"""


def test_a_norm_that_its_network_keeps_frozen_stays_frozen_in_every_arm(network: Any, small_study: Study) -> None:
    run = small_study(network(FROZEN), "pruner.ratio=0.5", "dataset.train_limit=400")
    for entry in (run["large"], *run["arms"].values()):
        assert torch.equal(weights(entry)["norm.running_mean"], torch.zeros_like(weights(entry)["norm.running_mean"]))


@pytest.mark.parametrize("pruner", ["l1", "thinet", "regression"])
def test_a_view_that_takes_no_channels_last_images_gets_contiguous_ones(
    pruner: str, network: Any, small_study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    name = network("""
        class Other(Net):
            def finish(self):
                self.head = nn.Linear(12 * 64, 10)
            def forward(self, x):
                return self.head(self.features(x).view(x.shape[0], -1))
    """)
    with caplog.at_level(logging.INFO):
        sampled = [] if pruner == "l1" else ["pruner.images=50"]
        run = small_study(name, f"pruner={pruner}", *sampled)
    assert "takes no channels-last images (view size is not compatible" in caplog.text
    assert all(0 <= arm["top1"] <= 100 for arm in run["arms"].values())


@pytest.mark.parametrize("output", ["(y, y + 1)", "{'aux': y + 1, 'out': y}", "[y, None]"])
def test_of_several_outputs_the_logits_are_trained(output: str, network: Any, small_study: Study) -> None:
    text = f"class Other(Net):\n    def forward(self, x):\n        y = super().forward(x)\n        return {output}"
    both, alone = network(text), network(f"{text} if self.training else y")
    plain = small_study(network("class Other(Net): pass"), "arms=[finetune,scratch_e]")
    for name in (both, alone):
        run = small_study(name, "arms=[finetune,scratch_e]")
        for entry in ("finetune", "scratch_e"):
            expected = weights(plain["arms"][entry])
            assert all(torch.equal(t, expected[key]) for key, t in weights(run["arms"][entry]).items())


def test_buffers_that_no_state_dict_holds_come_along(network: Any, small_study: Study) -> None:
    name = network("""
        class Other(Net):
            def finish(self):
                self.register_buffer("mean", torch.zeros(3, 1, 1), persistent=False)
                self.shift = float(np.random.rand())
            def forward(self, x):
                if self.training:
                    self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)).view(3, 1, 1))
                return super().forward(x - self.mean) * self.shift
    """)
    run = small_study(name, "arms=[finetune]")
    factory = import_object(name.removeprefix("model.name="), "model.name")
    stage = Path(run["arms"]["finetune"]["stage"])
    assert weights(run["arms"]["finetune"])["mean"].any()
    assert load_model(stage, factory=factory).mean.any()  # type: ignore[operator, union-attr]


def test_what_no_file_holds_is_noticed_when_it_is_loaded(network: Any, small_study: Study) -> None:
    name = network("""
        class Other(Net):
            calls = 0
            def finish(self):
                Other.calls += 1
                self.sign = 1.0
            def forward(self, x):
                return self.sign * super().forward(x)
    """)
    run = small_study(name, "arms=[finetune]")
    factory: Any = import_object(name.removeprefix("model.name="), "model.name")

    def flipped(num_classes: int, in_channels: int) -> torch.nn.Module:
        model = factory(num_classes, in_channels)
        model.sign = -1.0
        return model

    stage = Path(run["arms"]["finetune"]["stage"])
    load_model(stage, factory=factory)
    with pytest.raises(UserError, match="Other gives other logits than when the stage was made"):
        load_model(stage, factory=flipped)


@pytest.mark.parametrize("draw", ["np.random.rand", "np.random.default_rng().random"])
def test_a_pruner_of_ones_own_is_seeded_or_refused(draw: str, tmp_path: Path, small_study: Study, network: Any) -> None:
    (tmp_path / f"own_pruner_{len(draw)}.py").write_text(
        textwrap.dedent(f"""
            import numpy as np
            import torch
            from rethink_prune.pruning import Pruner

            class Mine(Pruner):
                def scores(self, model, groups, *, data, generator):
                    return {{group.name: torch.from_numpy({draw}(group.size)) for group in groups}}
        """)
    )
    arguments = f"pruner.name=own_pruner_{len(draw)}:Mine", "pruner.ratio=0.5", "arms=[finetune]"
    if "default_rng" in draw:
        with pytest.raises(UserError, match="Mine: draws random numbers that the seed does not reach"):
            small_study(*arguments)
        return
    runs = [small_study(*arguments, f"store.root={name}") for name in ("one", "two")]
    first, second = (weights(run["arms"]["finetune"]) for run in runs)
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
