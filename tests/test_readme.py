"""The scripts of README and of the tour run as they stand, with fewer updates; links and names are real."""

import inspect
import re
import warnings
from pathlib import Path

import pytest

import pp_diffusion as ppd

ROOT = Path(__file__).parent.parent
README, TOUR = (ROOT / "README.md").read_text(), (ROOT / "docs" / "tour.md").read_text()


def run_blocks(text, replacements):
    """All blocks of a page as one script, smaller; its names afterwards."""
    script = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    assert not [old for old in replacements if old not in script]
    for old, new in replacements.items():
        script = script.replace(old, new)
    scope: dict = {}
    exec(compile(script, "page.md", "exec"), scope)
    return scope


@pytest.mark.slow
def test_the_readme_leads_from_data_to_a_posterior(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = {
        "num_steps=3_000": "num_steps=20, progress_bar=False",
        "num_timesteps=50": "num_timesteps=8",
        "(64, 64)": "(8, 8)",
        "num_trajectories=256": "num_trajectories=32, progress_bar=False",
        "num_particles=250": "num_particles=32, progress_bar=False",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ppd.CollapseWarning)  # twenty updates
        scope = run_blocks(README, small)
    assert scope["flavanoids"].shape == (8 * 32,)
    assert (tmp_path / "wine.ppd").exists()
    out = capsys.readouterr().out
    assert "K - L_null" in out and "log evidence" in out


@pytest.mark.slow
def test_the_tours_scripts_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = {
        "4_000": "20",
        "50_000": "600, 100",
        "constant_erasure(2000)": "constant_erasure(20)",
        "num_warmup=300, num_samples=500": "num_warmup=2, num_samples=4, progress_bar=False",
        "num_particles=1024": "num_particles=32, progress_bar=False",
    }
    scope = run_blocks(TOUR, small)
    assert scope["x"].shape == (1000, 2)
    assert scope["simulated"]["y"].shape == (100, 1)
    assert scope["replicated"]["y"].shape == (32, 1)
    assert set(scope["mcmc"].get_samples()) == {"x", "x_noise", "sigma"}
    assert scope["samples"].shape == (100, 2)
    out = capsys.readouterr().out
    assert "K - L_null" in out and "r_hat" in out


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/**/*.md")))])
def test_links_within_the_repository_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_every_public_name_is_real():
    for name in re.findall(r"ppd\.(\w+(?:\.\w+)?)", README + TOUR):
        target = ppd
        for part in name.split("."):
            target = getattr(target, part)


def test_every_public_name_has_its_page():
    """docs/api/ has an entry for all that `dir(pp_diffusion)` shows, and each has a docstring."""
    docs = ROOT / "docs"
    page = "\n".join(path.read_text() for path in [docs / "api.md", *(docs / "api").glob("*.md")])
    for name in set(dir(ppd)) - {"__version__"}:
        value = getattr(ppd, name)
        assert re.search(rf":: pp_diffusion\.{name}\b" if inspect.ismodule(value) else rf":: {name}\b", page), name
        assert inspect.getdoc(value), name
