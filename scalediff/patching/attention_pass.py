"""`attention_pass`: compute the attention calls of any code by a plan, for exports and for models that other software holds."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from types import TracebackType

from scalediff.arguments import check_boolean, wrong_type
from scalediff.patching.call import Call
from scalediff.patching.interception import Pass, close_pass, current, open_pass
from scalediff.patching.plan import AttentionPlan
from scalediff.patching.stack import CHECKPOINTING, in_checkpoint


@dataclass
class PassCalls:
    """The attention calls of a pass. Those inside a graph of torch.compile cannot be counted: together they are one.

    Attributes:
        taken: Number of calls that were computed in windows.
        left: Why calls that look like image self-attention ran full attention, and how many.
        others: Numbers of queries and keys of all other calls, and how many.
    """

    taken: int = 0
    left: dict[str, int] = field(default_factory=dict)
    others: dict[tuple[int, int], int] = field(default_factory=dict)


class attention_pass:
    """Compute the attention calls of the code in a `with` block by a plan; other calls, and other threads, are left alone.

        with scalediff.attention_pass(plan) as calls:
            exported = torch.export.export(model, (x, t))
        print(calls.taken)

    The block replaces `F.scaled_dot_product_attention` and the backends of diffusers' dispatcher while it runs. A patched model inside the
    block opens a pass of its own, which counts and checks its calls.

    Args:
        plan: What the calls of the block mean. Nothing is replaced if its grid is not larger than its window.
        strict: Raise an error if no call was computed in windows; warn instead when False.

    Raises:
        TypeError: `plan` is not an `AttentionPlan`.
        ValueError: At the end of the block, under `strict`: no call was computed in windows, nor in a pass inside the block.
        NotImplementedError: A call is made inside gradient checkpointing that began in the block: it would be computed again after the
            block, with full attention.

    Warns:
        UserWarning: Calls that look like image self-attention ran full attention.
    """

    def __init__(self, plan: AttentionPlan, *, strict: bool = True) -> None:
        if not isinstance(plan, AttentionPlan):
            raise wrong_type("plan", "an AttentionPlan", plan)
        check_boolean("strict", strict)
        self._plan, self._strict = plan, strict

    def __enter__(self) -> PassCalls:
        counter = _Counter(PassCalls())
        if not self._plan.is_native:
            open_pass(counter, self._plan, self._plan.layout.weights, frame=sys._getframe(1))
        return counter.calls

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._plan.is_native:
            return
        finished = current()
        assert finished is not None
        assert isinstance(finished.owner, _Counter)
        close_pass(finished)
        if error is not None:
            return
        calls = finished.owner.calls
        if finished.intercepted_in_graph:
            calls.taken += 1
        if finished.skipped_in_graph:
            calls.left.setdefault(finished.skipped_in_graph, 1)
        if calls.left:
            reasons = "; ".join(f"{why} ({count} calls)" for why, count in calls.left.items())
            warnings.warn(f"scalediff: attention calls ran full attention: {reasons}", stacklevel=2)
        if calls.taken == 0 and not finished.contains_passes:
            seen = ", ".join(f"{queries} queries and {keys} keys" for queries, keys in calls.others) or "no other calls"
            problem = f"no attention call had the tokens of {self._plan.grids}, got {seen}"
            if self._strict:
                raise ValueError(problem)
            warnings.warn(f"scalediff: {problem}", stacklevel=2)


class _Counter:
    """The owner of one pass: it counts the calls."""

    def __init__(self, calls: PassCalls) -> None:
        self.calls = calls

    def on_intercepted(self, current_pass: Pass, call: Call) -> None:
        """Count a call that is about to be computed in windows."""
        if current_pass.with_gradients and in_checkpoint(current_pass.depth):
            raise NotImplementedError(CHECKPOINTING)
        self.calls.taken += 1

    def on_skipped(self, current_pass: Pass, why: str, lengths: tuple[int, int]) -> None:
        """Count a call that looks like image self-attention and runs full attention."""
        self.calls.left[why] = self.calls.left.get(why, 0) + 1

    def on_other(self, current_pass: Pass, lengths: tuple[int, int]) -> None:
        """Count another call."""
        self.calls.others[lengths] = self.calls.others.get(lengths, 0) + 1

    def on_observed(self, current_pass: Pass, call: Call | None, why: str, lengths: tuple[int, int]) -> None:
        """Never called: such a pass does not only observe."""
