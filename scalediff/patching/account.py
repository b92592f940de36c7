"""What the passes of one patched denoiser did: the checks after every pass, and the rows of the report."""

from __future__ import annotations

import warnings
import weakref

from torch import nn

from scalediff.families.base import Family, find_obstacle
from scalediff.families.grid import AttentionSite, Grid, patch_of, window_of
from scalediff.patching.caches import cache_names
from scalediff.patching.call import Call
from scalediff.patching.causes import describe_calls, other_attention
from scalediff.patching.interception import Pass, torch_function
from scalediff.patching.record import Callers, ModuleCalls
from scalediff.patching.report import Report, Row

_NO_CALL = "it made no call of scaled_dot_product_attention"


class Account:
    """The attention calls of a patched denoiser, pass by pass.

    Args:
        denoiser: The network; held by a weak reference.
        family, native, prefix, strict: As in `Target`.
    """

    def __init__(self, denoiser: nn.Module, family: Family, native: Grid, *, prefix: str, strict: bool) -> None:
        self._denoiser, self._callers = weakref.ref(denoiser), Callers(denoiser)
        self._family, self._native, self._prefix, self._strict = family, native, prefix, strict
        self._sites = {site.name: site for site in family.sites(denoiser)}
        self._last: Pass | None = None  # above the native area
        self._known: dict[str, ModuleCalls] = {}  # the last pass in which each module made a call
        self._processors: dict[str, type] = {}  # of each module, when it last made a call
        self._missing = frozenset(site.name for site in self._sites.values() if site.obstacle)  # warned of when the model was patched
        self._already_warned: set[str] = set()  # reasons
        self._most_intercepted = 0  # calls in any pass
        self._last_intercepted = -1  # calls in the previous pass; -1 before the first
        self.layout_is_checked = family.listed

    def taken(self, current_pass: Pass, call: Call) -> None:
        """Count a call that is about to be computed in windows."""
        current_pass.intercepted += 1
        calls = self._calls(current_pass)
        calls.taken, calls.call = calls.taken + 1, call

    def left(self, current_pass: Pass, lengths: tuple[int, int], why: str = "") -> None:
        """Count a call that runs full attention.

        If it looks like self-attention, `why` is given: warn, or wait for the end of a pass that may raise an error.
        """
        calls = self._calls(current_pass)
        calls.left, calls.why = calls.left + 1, why or calls.why
        calls.lengths[lengths] = None
        if not why or _without_shapes(why) in {*self._already_warned, *map(_without_shapes, current_pass.skipped.values())}:
            return
        name = self._prefix + next(name for name, of_module in current_pass.calls.items() if of_module is calls)
        if self._must_intercept:
            current_pass.skipped[name] = why
        else:
            self.warn_once(name, why)

    def observed(self, current_pass: Pass, call: Call | None, why: str, lengths: tuple[int, int]) -> None:
        """Count a call of a pass that only observes, and that would be computed in windows if `call` is given."""
        calls = self._calls(current_pass)
        calls.lengths[lengths] = None
        if call is not None:
            calls.taken, calls.call = calls.taken + 1, call
        else:
            calls.left, calls.why = calls.left + 1, why or calls.why

    def dry_run(self, finished: Pass) -> Report:
        """The report of a pass that only observed. This account is not changed."""
        self._callers.may_have_changed = True
        denoiser = self._denoiser()
        assert denoiser is not None
        dry = Account(denoiser, self._family, self._native, prefix=self._prefix, strict=False)
        dry._last, dry._known = finished, finished.calls
        found = tuple(f"{self._name} also uses {cause}" for cause in other_attention(denoiser, torch_function()))
        notes = (*dry.notes(), *found, describe_calls({self._prefix + name: calls for name, calls in finished.calls.items()}, most=8))
        call = "a dry run: these calls would be computed in windows above the native area, and none was"
        return Report(self._family.denoiser, tuple(dry.rows()), call, known=self._family.listed, notes=notes)

    def check(self, finished: Pass) -> None:
        """Check a finished pass.

        Raises:
            ValueError: Calls that should have been computed in windows were not, under `strict` or in a picture that is split in bands.
        """
        self._callers.may_have_changed = True
        if finished.observes:
            self._check_lengths(finished)
            return
        self._last, count = finished, finished.intercepted
        silent = [self._prefix + name for name, calls in self._known.items() if calls.call is not None and name not in finished.calls]
        for name, calls in finished.calls.items():
            before = self._known.get(name)
            calls.call = calls.call or (before.call if before is not None else None)
            self._known[name] = calls
        if silent and count > 0 and not self._family.listed and not finished.in_graph and not self._caches():
            self.warn_once(", ".join(silent), f"{', '.join(silent)} made calls in an earlier pass and none in this one, or was skipped")
        if finished.skipped_in_graph:
            self.warn_once(f"an attention call of the compiled {self._name}", finished.skipped_in_graph)
        self._check_missing(finished)
        if count > 0 and self._most_intercepted == 0 and not self._family.listed:
            self._warn_of_other_attention()
        if count != self._last_intercepted and not finished.intercepted_in_graph and not finished.skipped_in_graph:
            none = f"no call of scaled_dot_product_attention had the tokens of {finished.plan.grids}"
            if count == 0 and self._must_intercept:
                self._last_intercepted = 0
                why = next(iter(finished.skipped.values()), none)
                cause = self._cause(finished)
                raise ValueError(f"nothing was patched: {why}, in {self._name}; the pass ran full attention. {cause}")
            for name, why in finished.skipped.items():
                self.warn_once(name, why)
            if count == 0 and not self._all_skipped(finished):
                if self._most_intercepted > 0 and not self._family.listed:
                    self._warn(self._name, f"{none}, and an earlier pass had some. {self._cause(finished)}")
                elif not self._already_warned and not self._missing:
                    self.warn_once(self._name, f"{none}. {self._cause(finished)}")
        self.layout_is_checked = self.layout_is_checked or count > 0
        self._last_intercepted, self._most_intercepted = count, max(count, self._most_intercepted)

    def unknown_layout(self, why: str, *, is_error: bool = False) -> None:
        """Warn that a pass runs full attention because its layout is unknown.

        For an unlisted model under `strict`, raise an error in the first pass, or in any if `is_error`: the caller's description failed.
        """
        first = not self.layout_is_checked and self._last_intercepted < 0
        if self._strict and not self._family.listed and (first or is_error):
            self._last_intercepted = max(0, self._last_intercepted)
            raise ValueError(f"nothing was patched: {self._name} runs full attention: {why}")
        self.warn_once(self._name, why)

    def warn_once(self, name: str, why: str) -> None:
        """Warn once per reason, naming the first module that it concerns."""
        if _without_shapes(why) not in self._already_warned:
            self._already_warned.add(_without_shapes(why))
            self._warn(name, why)

    def rows(self) -> list[Row]:
        """Rows of the report: the attention modules of a listed family, or the modules that called attention in any other model."""
        if self._family.listed:
            return [self._row(site) for site in self._sites.values()]
        return [self._row_of_calls(name, calls) for name, calls in self._known.items()]

    def seen(self) -> dict[str, Call]:
        """The modules whose attention was computed in windows, and their kind of call."""
        return {self._prefix + name: calls.call for name, calls in self._known.items() if calls.call is not None}

    def last_pass(self) -> str:
        """What the last pass above the native area did; empty before such a pass."""
        if self._last is None:
            return ""
        of, grid = f"{self._name}, " if self._prefix else "", "{} x {} tokens".format(*self._last.plan.grid)
        if self._last.in_graph:
            return f"{of}{grid}; calls in compiled graphs are not counted"
        calls = self._last.calls.values()
        taken, left = sum(c.taken for c in calls), sum(c.left for c in calls if c.why)
        silent = sum(row.taken == 0 and row.left == 0 and row.role in ("self", "joint") for row in self.rows())
        others = sum(c.left for c in calls if not c.why)
        return (
            f"{of}{grid}; {taken} self-attention calls in windows, {left} left to full attention, {silent} modules without a call; "
            f"{others} other calls"
        )

    def notes(self) -> list[str]:
        """What to know beyond the rows."""
        denoiser = self._denoiser()
        if self._family.listed or self._family.text == "-" or denoiser is None or self._family.rotation(denoiser) is not None:
            return []
        if self._last is not None and not any(call.sequence.text for call in self._last.plan.calls):  # layout= has no text
            return []
        remedy = "if its positions are rotary, pass text_rope=TextRotation(axes, theta)"
        return [f"the text of {self._name} is not rotated for each window: {remedy}"]

    @property
    def _must_intercept(self) -> bool:
        """Whether this is the first pass above the native area of an unlisted model, under `strict`."""
        return self._strict and not self._family.listed and self._last_intercepted < 0

    @property
    def _name(self) -> str:
        return type(self._denoiser()).__name__

    def _calls(self, current_pass: Pass) -> ModuleCalls:
        """The calls of the module that is making one."""
        name, module = self._callers.find(self._sites, listed=self._family.listed)
        if name in self._sites:
            self._processors[name] = type(getattr(module, "processor", None))
        return current_pass.calls.setdefault(name or self._name, ModuleCalls())

    def _check_missing(self, finished: Pass) -> None:
        """Raise an error, or warn whenever they change, about self-attention modules that ran without a call of attention."""
        missing: dict[str, str] = {}
        for site in self._sites.values():
            if site.role in ("self", "joint") and site.name not in finished.calls:
                module = self._module(site)
                why = "" if module is None else find_obstacle(module)
                if not why and not finished.in_graph and not self._is_skipped(site.name, module):
                    why = _NO_CALL
                if why:
                    missing[site.name] = why
        before, self._missing = self._missing, frozenset(missing)
        strict = self._strict or getattr(finished.split, "group", None) is not None  # the result would be that of each band alone
        if not missing or (before == self._missing and not strict):
            return
        names = ", ".join(self._prefix + name for name in missing)
        count = sum(site.role in ("self", "joint") for site in self._sites.values())
        verb = "runs" if len(missing) == 1 else "run"
        reasons = "; ".join(dict.fromkeys(missing.values()))
        if _NO_CALL in missing.values() and (caches := self._caches()):
            reasons += f"; or {', '.join(caches)} reused what was computed before the model was patched: disable and enable the cache again"
        problem = f"{names} {verb} full attention: {reasons} ({len(missing)} of {count} self-attention modules of {self._name})"
        if strict:
            raise ValueError(problem)
        warnings.warn(f"scalediff: {problem}", stacklevel=4)

    def _is_skipped(self, name: str, module: nn.Module | None) -> bool:
        """Whether a module without a call in a pass was skipped, as caches and guidance do: it has made calls with this processor."""
        return self._processors.get(name) is type(getattr(module, "processor", None))

    def _all_skipped(self, finished: Pass) -> bool:
        """Whether no attention of the image was computed in a pass because all of it was skipped."""
        if finished.intercepted or finished.skipped or not self._most_intercepted:
            return False
        known = {site.name for site in self._sites.values() if site.role in ("self", "joint")}
        if self._family.listed:
            return known.isdisjoint(finished.calls) and not self._missing
        return bool(self._caches())

    def _caches(self) -> list[str]:
        denoiser = self._denoiser()
        return [] if denoiser is None else cache_names(denoiser)

    def _warn_of_other_attention(self) -> None:
        """After the first pass of an unlisted model with windows: modules that never call `F.scaled_dot_product_attention` are not seen."""
        denoiser = self._denoiser()
        for cause in [] if denoiser is None else other_attention(denoiser, torch_function(), certain=True):
            self.warn_once(f"a part of {self._name}", f"it uses {cause}")

    def _check_lengths(self, finished: Pass) -> None:
        """Check that the calls of an unlisted model's first pass have the lengths of its layout, also at native size."""
        expected = {call.sizes.lengths for call in finished.plan.calls}
        if finished.in_graph or any(lengths in expected for calls in finished.calls.values() for lengths in calls.lengths):
            self.layout_is_checked = True
            return
        lengths = " or ".join(f"{queries} queries and {keys} keys" for queries, keys in sorted(expected))
        why = f"no call of scaled_dot_product_attention had the tokens of {finished.plan.grids} ({lengths})"
        problem = f"{why}, in {self._name}: {self._cause(finished)}"
        if self._strict:
            raise ValueError(f"the token grid of {self._name} does not fit: {problem}")
        self.warn_once(self._name, problem)

    def _cause(self, finished: Pass) -> str:
        denoiser = self._denoiser()
        found = [] if denoiser is None else other_attention(denoiser, torch_function())
        calls = describe_calls({self._prefix + name: calls for name, calls in finished.calls.items()})
        return calls + (f". The model also uses {'; '.join(found)}" if found else "")

    def _warn(self, name: str, why: str) -> None:
        warnings.warn(f"scalediff: {name} runs full attention: {why}", stacklevel=4)

    def _module(self, site: AttentionSite) -> nn.Module | None:
        denoiser = self._denoiser()
        try:
            module = None if denoiser is None else denoiser.get_submodule(site.name)
        except AttributeError:  # replaced since the model was patched
            return None
        return module if hasattr(module, "processor") else None

    def _counts(self, name: str) -> tuple[int | None, int | None]:
        """Calls that the last pass took and left."""
        if self._last is None or (self._last.in_graph and name not in self._last.calls):
            return None, None
        calls = self._last.calls.get(name, ModuleCalls())
        return calls.taken, calls.left

    def _row(self, site: AttentionSite) -> Row:
        name, source, text = self._prefix + site.name, self._family.grid_source, "-" if site.role == "self" else self._family.text
        taken, left = self._counts(site.name)
        if site.role in ("cross", "text"):
            why = "text cross-attention" if site.role == "cross" else "no image tokens"
            return Row(name, site.role, "-", "-", None, None, "untouched", why, taken, left)
        why = self._why_untouched(site, taken, left)
        if why:
            return Row(name, site.role, source, text, None, None, "untouched", why, taken, left)
        window, patch = window_of(self._native, site.level), patch_of(self._native, site.level)
        return Row(name, site.role, source, text, window, patch, "patched", self._why_in_part(site.name), taken, left)

    def _why_in_part(self, name: str) -> str:
        """Why some calls of a module ran full attention in the last pass, beside those in windows; empty if none did."""
        calls = self._last.calls.get(name) if self._last is not None else None
        return f"in part, {calls.why}" if calls is not None and calls.taken and calls.left and calls.why else ""

    def _why_untouched(self, site: AttentionSite, taken: int | None, left: int | None) -> str:
        module = self._module(site)
        obstacle = site.obstacle if module is None else find_obstacle(module)
        if taken is None:
            return obstacle
        if taken or self._last is None:
            return ""
        calls = self._last.calls.get(site.name)
        if calls is None:
            skipped = self._is_skipped(site.name, module)
            return obstacle or ("a cache or guidance skipped it" if skipped else _NO_CALL) + " in the last pass"
        return calls.why or _other_lengths(calls)

    def _row_of_calls(self, name: str, calls: ModuleCalls) -> Row:
        taken, left = self._counts(name)
        full = self._prefix + name
        if calls.call is None:
            role = "self" if calls.why else "cross"
            return Row(full, role, "-", "-", None, None, "untouched", calls.why or _other_lengths(calls), taken, left)
        text, role = (self._family.text, "joint") if calls.call.sequence.text else ("-", "self")
        if taken == 0:
            why = (calls.why or _other_lengths(calls)) if left else f"{_NO_CALL} in the last pass"
            return Row(full, role, self._family.grid_source, text, None, None, "untouched", why, taken, left)
        why = self._why_in_part(name)
        return Row(full, role, self._family.grid_source, text, calls.call.window, calls.call.patch, "patched", why, taken, left)


def _other_lengths(calls: ModuleCalls) -> str:
    return "other tokens: " + ", ".join(f"{queries} queries and {keys} keys" for queries, keys in calls.lengths)


def _without_shapes(why: str) -> str:
    """A reason without the shapes of the particular call."""
    return why.partition(", got")[0]
