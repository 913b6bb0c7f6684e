"""Parameters of a spec: known to the method, in range, α in one form."""

from collections.abc import Mapping
from dataclasses import dataclass

from expo.checkpoint.yaml_values import Path_
from expo.errors import SpecError
from expo.operators.methods import WITHOUT_EFFECT, Default
from expo.spec.inputs import KNOWN, Takes
from expo.spec.request import resolve_alpha
from expo.spec.settings import Setting, Settings, is_number, mapped, parse_setting
from expo.spec.strict import Document, nearest

_UP_TO_1 = ("density", "epsilon", "gamma", "select_topk")
"""Parameters that are a share: of elements, or of chances."""


@dataclass(frozen=True)
class Reader:
    """Reads the parameters of one method; faults, doubts and remarks go to the document."""

    document: Document
    name: str
    method: Takes
    interpolate: bool = False

    def settings(self, parameters: Mapping[str, object] | None, path: Path_) -> Settings:
        settings: dict[str, Setting] = {}
        known = {**self.method.each, **self.method.shared}
        for key, value in (parameters or {}).items():
            if key == "paper_alpha" and self.name == "expo":
                continue
            if key not in known:
                self._unknown(key, (*path, key), known)
                continue
            setting = self._setting(value, (*path, key), known[key])
            if setting is not None:
                settings[key] = setting
        if self.name == "expo":
            self._alpha(dict(parameters or {}), settings, path)
        return settings

    def _setting(self, value: object, path: Path_, default: Default) -> Setting | None:
        flag = isinstance(default, bool)
        self._doubt_filters(value, path)
        setting = self.document.attempt(path, lambda: parse_setting(value, flag=flag))
        if setting is None:
            return None
        ranged = self.document.attempt(path, lambda: in_range(str(path[-1]), setting, flag=flag))
        return None if ranged is None else setting

    def _doubt_filters(self, value: object, path: Path_) -> None:
        """Keys of filters that mean nothing, and filters that come after one that fits everything."""
        entries = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
        catches_all = [isinstance(e, dict) and e.get("filter") in (None, "*") for e in entries]
        if True in catches_all[:-1] and all(isinstance(entry, dict) for entry in entries):
            last = catches_all.index(True)
            told = "has no effect: the entry before it fits every tensor"
            self.document.remark((*path, last + 1), told)
        for number, entry in enumerate(entries):
            if isinstance(entry, dict):
                where = path if isinstance(value, dict) else (*path, number)
                for key in entry.keys() - {"value", "filter"}:
                    self.document.unknown_key((*where, key), ["value", "filter"])

    def _unknown(self, key: str, path: Path_, known: Mapping[str, object]) -> None:
        takers = [name for name, m in KNOWN.items() if key in m.each or key in m.shared]
        if key in WITHOUT_EFFECT and self.name != "expo":
            self.document.remark(path, "has no effect here")
            return
        names = [*known, *(["paper_alpha"] if self.name == "expo" else [])]
        every = [name for m in KNOWN.values() for name in (*m.each, *m.shared)]
        cure = nearest(key, names) or nearest(key, every)
        if takers:
            cure = f" ({takers[0]} takes it; {self.name} takes {', '.join(names) or 'none'})"
        self.document.doubt(path, f"is not a parameter of {self.name}{cure}", so="ignored")

    def _alpha(self, given: dict[str, object], settings: dict[str, Setting], path: Path_) -> None:
        """α from either convention; every single value of a gradient or filter is one."""
        if "alpha" in given and "paper_alpha" in given:
            fault = "give alpha or paper alpha, not both (alpha = paper alpha + 1)"
            self.document.fault(path, fault)
            return
        key = "paper_alpha" if "paper_alpha" in given else "alpha"
        setting = settings.get("alpha") if key == "alpha" else None
        if key == "paper_alpha":
            setting = self._setting(given[key], (*path, key), None)
        if setting is None:
            return

        def convert(value: float) -> float:
            pair = (value, None) if key == "alpha" else (None, value)
            alpha = resolve_alpha(*pair, interpolate=self.interpolate or not is_number(setting))
            assert alpha is not None
            return alpha

        converted = self.document.attempt((*path, key), lambda: mapped(setting, convert))
        if converted is not None:
            settings["alpha"] = converted


def in_range(key: str, setting: Setting, *, flag: bool = False) -> Setting:
    """The setting.

    Raises:
        SpecError: one of its values is out of the parameter's range.
    """

    def check(value: float) -> float:
        if flag and value not in (0.0, 1.0):
            raise SpecError(f"is true or false, not {value:g}")
        if key in _UP_TO_1 and not 0.0 <= value <= 1.0:
            raise SpecError(f"is a share from 0 to 1, not {value:g}")
        return value

    mapped(setting, check)
    return setting
