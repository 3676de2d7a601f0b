import sys
from types import ModuleType
from typing import Any

import pytest

import vlprune


class Recorder(ModuleType):
    """Stands in for vlprune.pipeline: every function records its arguments and returns `result` or raises `error`."""

    def __init__(self) -> None:
        super().__init__("vlprune.pipeline")
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.result: Any = {"done": True}
        self.error: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def function(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, arguments, options))
            if self.error:
                raise self.error
            return self.result

        return function


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "vlprune.pipeline", recorder)
    monkeypatch.setattr(vlprune, "pipeline", recorder, raising=False)
    return recorder
