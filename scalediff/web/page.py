"""The page: its layout, and what happens when something on it is used."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from scalediff.cascade.describing import device_name
from scalediff.cascade.pictures import BEHIND_MASK
from scalediff.cascade.pipeline import enlarged_size, native_size
from scalediff.web import controls
from scalediff.web.gallery import Gallery
from scalediff.web.jobs import FIELDS, SETTINGS, Job, job_of, preset_values, values_of_metadata
from scalediff.web.runs import Cancelled, Run, one_line
from scalediff.web.uploads import check_mask, open_upload
from scalediff.web.views import details_html, empty_html, gallery_html, preview_html, status_html, upload_html, viewer_html

_EXPECTED = (ValueError, TypeError, NotImplementedError, RuntimeError, OSError)  # errors whose messages are for the user
_HINT = "Draw a picture, or choose one below. Scroll to zoom, drag to move."
_WAITING = 16  # runs that may wait for their turn
_PRIVATE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_AT_ONCE = {**_PRIVATE, "concurrency_limit": None}
_IN_TURN = {**_PRIVATE, "concurrency_limit": 1, "concurrency_id": "pipeline"}  # all buttons that draw share one place
# A click on a picture of the gallery, with its name as the event's data.
_PICK = """element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-picture]');
  if (button) trigger('select', { picture: button.dataset.picture });
});"""


class Page:
    """What the page does. Everything that only one user sees is passed in and out; `runs` holds the run of every session.

    Args:
        pipe: The pipeline.
        model: The name that it was loaded by.
        gallery: The pictures.
    """

    def __init__(self, pipe: Any, *, model: str, gallery: Gallery) -> None:
        self.pipe, self.model, self.gallery = pipe, model, gallery
        self.runs: dict[str, Run] = {}

    def job(self, values: Sequence[Any], picture: Any = None, mask: str | None = None, *, compare: bool = False) -> Job:
        """The job that the controls describe, with an uploaded picture and the file of its mask; an error is shown on the page."""
        try:
            given = dict(zip(FIELDS, values, strict=True))
            return job_of(self.pipe, given, picture=picture, mask=_opened_mask(mask), compare=compare)
        except _EXPECTED as error:
            raise _shown(error) from error

    def draw(self, job: Job, session: str) -> Iterator[tuple[Any, ...]]:
        """Run a job, and yield the status, the viewer, the facts of the picture, the gallery, the picture's name, and what went wrong."""
        run = self.runs[session] = Run(self.pipe, job, self.gallery, self.model)
        progress, same = run.progress(), gr.skip()
        try:
            yield status_html("Starting", 0.0), same, "", same, None, None  # the facts are those of another picture
            for event in progress:
                status = status_html(event.text, event.share)
                if event.name is not None:
                    yield status, *self.show(event.name), gallery_html(self.gallery), event.name, None
                else:
                    yield status, same if event.preview is None else preview_html(event.preview), same, same, same, None
            yield status_html("Finished"), same, same, same, same, None
        except Cancelled:
            yield status_html("Cancelled"), same, same, same, same, None
        except Exception as error:
            text = one_line(error) if isinstance(error, _EXPECTED) else f"{type(error).__name__}: {one_line(error)}"
            if not isinstance(error, _EXPECTED):
                traceback.print_exception(error)
            yield status_html(text, error=True), same, same, same, same, text
        finally:
            progress.close()
            if self.runs.get(session) is run:
                del self.runs[session]
            run.closed.set()

    def cancel(self, session: str) -> None:
        """Cancel the run of a session, if there is one."""
        if session in self.runs:
            self.runs[session].cancel()

    def show(self, name: str) -> tuple[str, str]:
        """The viewer and the facts of a picture of the gallery."""
        try:
            return viewer_html(self.gallery, name), details_html(self.gallery, name)
        except _EXPECTED as error:
            raise _shown(error) from error

    def reuse(self, name: str | None) -> list[Any]:
        """The values of the controls that drew a picture, in the order of `FIELDS`."""
        if not name:
            raise gr.Error("Choose a picture first.", duration=8, print_exception=False)
        try:
            values = values_of_metadata(self.gallery.metadata(name))
        except _EXPECTED as error:
            raise _shown(error) from error
        return [values.get(field, gr.skip()) for field in FIELDS]

    def upload(self, path: str | None, mask: str | None) -> tuple[Any, ...]:
        """What follows from an uploaded file, or from None where it was taken away, beside the file of a mask.

        Returns:
            The picture, the height and width to enlarge it to, a view of it, the buttons that draw and compare, and what went wrong.
        """
        same, failed = gr.skip(), None
        if path is not None:
            try:
                picture = open_upload(Path(path))
                size, (view, failed) = enlarged_size(self.pipe, picture), self.upload_mask(mask, picture)
                return picture, *size, view, gr.update(value="Enlarge"), gr.update(interactive=False), failed
            except _EXPECTED as error:
                failed = one_line(error)
        return None, same, same, same, gr.update(value="Draw"), gr.update(interactive=True), failed

    def upload_mask(self, path: str | None, picture: Any) -> tuple[Any, str | None]:
        """A view of the uploaded picture with its mask, and what is wrong with the mask."""
        try:
            mask = _opened_mask(path)
            if picture is not None and mask is not None:
                check_mask(mask, picture)
        except _EXPECTED as error:
            return gr.skip() if picture is None else upload_html(picture), one_line(error)
        return gr.skip() if picture is None else upload_html(picture, mask), None


def _opened_mask(path: str | None) -> Any:
    """An uploaded mask; None if there is none."""
    return None if path is None else open_upload(Path(path), behind=BEHIND_MASK)


def _shown(error: BaseException | str) -> gr.Error:
    """An error as a message on the page: one sentence."""
    text = error if isinstance(error, str) else one_line(error)
    return gr.Error(text[:1].upper() + text[1:], duration=12, print_exception=False)


def theme() -> Any:
    """Gradio's plain theme, with the fonts of the system: nothing is loaded from elsewhere."""
    return gr.themes.Default(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        radius_size=gr.themes.sizes.radius_md,
    )


def make_page(pipe: Any, *, model: str, gallery: Gallery) -> Any:
    """The page as a `gradio.Blocks`.

    Args:
        pipe: The pipeline.
        model: The name that it was loaded by.
        gallery: The pictures.
    """
    page = Page(pipe, model=model, gallery=gallery)
    native = " x ".join(map(str, native_size(pipe)))
    about = "the embedded model" if model == "demo" else model
    with gr.Blocks(title="scalediff", analytics_enabled=False, fill_width=True) as blocks:
        _html(f"<h1>ScaleDiff</h1><p>{escape(about)}, trained at {native} pixels, on {escape(device_name(pipe))}</p>", "sd-head")
        picture, shown, failed = gr.State(None), gr.State(None), gr.State(None)
        with gr.Row():
            with gr.Column(scale=4, min_width=330):
                fields = controls.add_prompt(pipe, example=model == "demo")
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", min_width=80, elem_id="sd-draw")
                    compare = gr.Button("Compare", min_width=80, elem_id="sd-compare")
                    cancel = gr.Button("Cancel", interactive=False, min_width=80, elem_id="sd-cancel")
                with gr.Accordion("Enlarge or change a picture", open=False, elem_id="sd-enlarge"):
                    file = gr.File(label="PNG, JPEG or WebP", height=110, elem_id="sd-file")
                    mask = gr.File(label="Mask: white changes", height=110, elem_id="sd-mask")
                    fields |= controls.add_change(pipe)
                with gr.Accordion("Method and switches", open=True):
                    fields |= controls.add_method(pipe)
                with gr.Accordion("Sampling", open=False):
                    fields |= controls.add_sampling(pipe)
                with gr.Accordion("Memory and previews", open=False):
                    fields |= controls.add_memory(pipe)
            with gr.Column(scale=8, min_width=400, elem_id="sd-right"):
                status = _html(status_html(""), "sd-status")
                viewer = _html(empty_html(_HINT), "sd-viewer")
                details = _html("", "sd-details")
                reuse = gr.Button("Use these settings", size="sm", visible=False, elem_id="sd-reuse")
                pictures = _html(gallery_html(gallery), "sd-pictures", js_on_load=_PICK)
        inputs = [fields[name] for name in FIELDS]
        buttons, outputs = [draw, compare, cancel], [status, viewer, details, pictures, shown, failed]
        runs = [
            _on_run(page, draw, inputs, [picture, mask], outputs, buttons, compare=False),
            _on_run(page, compare, inputs, [picture, mask], outputs, buttons, compare=True),
        ]
        _on_cancel(page, cancel, status, buttons, picture, runs)
        pictures.select(_picked(page), None, [viewer, details, shown, reuse], **_AT_ONCE)
        for drawn in runs:
            drawn.then(lambda name: gr.update(visible=name is not None), shown, reuse, **_AT_ONCE)
        reuse.click(page.reuse, shown, inputs, **_AT_ONCE)
        uploaded = [picture, fields["height"], fields["width"], viewer, draw, compare, failed]
        file.change(page.upload, [file, mask], uploaded, **_AT_ONCE).then(_report, failed, None, **_AT_ONCE)
        mask.change(page.upload_mask, [mask, picture], [viewer, failed], **_AT_ONCE).then(_report, failed, None, **_AT_ONCE)
        settings = [fields[name] for name in SETTINGS]
        fields["preset"].input(_preset_chosen(page), fields["preset"], settings, **_AT_ONCE)
        blocks.load(lambda: gallery_html(gallery), None, pictures, **_AT_ONCE)
        blocks.unload(_left(page))
    blocks.queue(max_size=_WAITING, api_open=False)
    return blocks


def _on_run(
    page: Page, button: Any, fields: list[Any], uploads: list[Any], outputs: list[Any], buttons: list[Any], *, compare: bool
) -> Any:
    """Connect a button that draws: check, wait for the pipeline, draw, and give the buttons back."""
    status, inputs = outputs[0], [*fields, *uploads]

    def begin(*values: Any) -> tuple[Any, ...]:
        page.job(values[:-2], *values[-2:], compare=compare)
        text = "Waiting until the pipeline is free" if page.runs else "Starting"
        return status_html(text, 0.0), *(gr.update(interactive=on) for on in (False, False, True))

    def run(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        yield from page.draw(page.job(values[:-2], *values[-2:], compare=compare), str(request.session_hash))

    begun = button.click(begin, inputs, [status, *buttons], **_AT_ONCE)
    # Gradio's default, "once", would drop a run that is begun before Gradio has done with the one that its user has just cancelled.
    drawn = begun.success(run, inputs, outputs, trigger_mode="multiple", **_IN_TURN)
    drawn.then(_ready, uploads[0], buttons, **_AT_ONCE).then(_report, outputs[-1], None, **_AT_ONCE)
    return drawn


def _ready(picture: Any) -> tuple[Any, ...]:
    """The buttons when nothing runs; an uploaded picture has nothing to compare with."""
    return tuple(gr.update(interactive=on) for on in (True, picture is None, False))


def _report(failed: str | None) -> None:
    """Show what went wrong, after the buttons are back."""
    if failed is not None:
        raise _shown(failed)


def _on_cancel(page: Page, button: Any, status: Any, buttons: list[Any], picture: Any, runs: list[Any]) -> None:
    """Connect the button that cancels: a run ends at its next step, and one that waits does not start."""

    def stop(picture: Any, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        run = page.runs.get(str(request.session_hash))
        if run is not None:
            run.cancel()
            yield status_html("Cancelling"), *(gr.update(interactive=False) for _ in buttons)
            run.closed.wait()  # later than the run itself has ended: Gradio would take the end of this one for that of the next
        yield status_html("Cancelled"), *_ready(picture)

    button.click(stop, picture, [status, *buttons], cancels=runs, **_AT_ONCE)


def _picked(page: Page) -> Callable[[gr.EventData], tuple[Any, ...]]:
    def pick(event: gr.EventData) -> tuple[Any, ...]:
        name = str(event.picture)
        return *page.show(name), name, gr.update(visible=True)

    return pick


def _preset_chosen(page: Page) -> Callable[[str], list[Any]]:
    def choose(name: str) -> list[Any]:
        try:
            values = preset_values(page.pipe, name)
        except _EXPECTED as error:
            raise _shown(error) from error
        return [values[field] for field in SETTINGS]

    return choose


def _left(page: Page) -> Callable[[gr.Request], None]:
    """When a user closes the page, its run has no reader any more."""

    def leave(request: gr.Request) -> None:
        page.cancel(str(request.session_hash))

    return leave


def _html(value: str, name: str, *, js_on_load: str | None = None) -> Any:
    return gr.HTML(value, elem_id=name, apply_default_css=False, js_on_load=js_on_load)
