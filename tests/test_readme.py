"""The README's scripts run as they stand, with fewer updates."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_scripts_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 5
    script = (
        "\n".join(blocks)
        .replace("4_000", "20")
        .replace("50_000", "600, 100")
        .replace("constant_erasure(2000)", "constant_erasure(20)")
        .replace("num_warmup=300, num_samples=500", "num_warmup=2, num_samples=4, progress_bar=False")
        .replace("num_particles=1024", "num_particles=32, progress_bar=False")
    )
    script = script.replace("progress_bar=True", "progress_bar=False")
    scope: dict = {}
    exec(compile(script, "README.md", "exec"), scope)
    assert scope["x"].shape == (1000, 2)
    assert scope["simulated"]["y"].shape == (100, 1)
    assert scope["replicated"]["y"].shape == (32, 1)
    assert set(scope["mcmc"].get_samples()) == {"x", "x_noise", "sigma"}
    assert scope["samples"].shape == (100, 2)
    out = capsys.readouterr().out
    assert "K - L_null" in out and "r_hat" in out


def test_every_public_name_is_real():
    import pp_diffusion as ppd

    for name in re.findall(r"ppd\.(\w+(?:\.\w+)?)", README):
        target = ppd
        for part in name.split("."):
            target = getattr(target, part)


def test_every_public_name_has_its_page():
    """docs/api/ has an entry for all that `dir(pp_diffusion)` shows, and each has a docstring."""
    import inspect

    import pp_diffusion as ppd

    docs = Path(__file__).parent.parent / "docs"
    page = "\n".join(path.read_text() for path in [docs / "api.md", *(docs / "api").glob("*.md")])
    for name in set(dir(ppd)) - {"__version__"}:
        value = getattr(ppd, name)
        assert re.search(rf":: pp_diffusion\.{name}\b" if inspect.ismodule(value) else rf":: {name}\b", page), name
        assert inspect.getdoc(value), name
