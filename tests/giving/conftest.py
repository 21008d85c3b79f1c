"""What a fresh process would run is run here, but in slow tests, which are of that process."""

import pytest

from normfix.giving import alone


@pytest.fixture(autouse=True)
def in_this_process(request, monkeypatch):
    """Run the script of a fresh process in this one, with its words."""
    if "slow" in request.keywords:
        return

    def here(script, *words):
        body = script.replace('sys.modules["normfix"] = None', "").replace("sys.argv[1:]", repr(words))
        exec(compile(body, "script", "exec"), {})
        return ""

    monkeypatch.setattr(alone, "run_fresh", here)
