// <scalediff-viewer>: one picture, or two with a divider between them, drawn from tiles at any zoom.
//
// Its attribute data-pictures is JSON: [{name, label, version, height, width}, ...]; the first is the result, the others are what it is
// compared with. Coordinates: a point p of the picture, in its pixels, is drawn at p * scale + offset, in pixels of the page.

const TILE = 256;
const MAX_SCALE = 32;
const tiles = new Map(); // address -> Image; shared, so that a picture that is shown again is there at once

function tileImage(address, redraw) {
  let image = tiles.get(address);
  if (!image) {
    image = new Image();
    image.src = address;
    if (tiles.size > 2000) tiles.delete(tiles.keys().next().value);
    tiles.set(address, image);
  }
  if (!image.complete) image.addEventListener("load", redraw, { once: true });
  return image.complete && image.naturalWidth ? image : null;
}

class Viewer extends HTMLElement {
  static observedAttributes = ["data-pictures"];

  connectedCallback() {
    if (!this.observer) this.listen();
    this.observer.observe(this);
    this.build();
  }

  /** Gradio keeps the element where it can, and changes its attribute. */
  attributeChangedCallback() {
    if (this.observer) queueMicrotask(() => this.build());
  }

  listen() {
    this.tabIndex = 0;
    this.setAttribute("role", "application");
    this.setAttribute("aria-label", "Picture; plus and minus zoom, arrows move, 0 fits, 1 shows every pixel");
    this.divider = 0.5;
    this.pointers = new Map();
    this.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
    this.addEventListener("pointerdown", (event) => this.onDown(event));
    this.addEventListener("pointermove", (event) => this.onMove(event));
    for (const name of ["pointerup", "pointercancel"]) this.addEventListener(name, (event) => this.onUp(event));
    this.addEventListener("dblclick", (event) => this.onDoubleClick(event));
    this.addEventListener("keydown", (event) => this.onKey(event));
    this.observer = new ResizeObserver(() => this.resize());
  }

  /** Make the parts for the pictures of the attribute. The zoom stays if the picture is of the same size as before. */
  build() {
    const before = this.right;
    this.pictures = JSON.parse(this.dataset.pictures);
    this.right = this.pictures[0];
    this.left = this.pictures.length > 1 ? this.pictures[this.pictures.length - 1] : null;
    this.line = null;
    this.canvas = document.createElement("canvas");
    this.replaceChildren(this.canvas);
    if (this.left) this.addDivider();
    this.addBar();
    if (before && (before.width !== this.right.width || before.height !== this.right.height)) this.scale = undefined;
    this.resize();
  }

  disconnectedCallback() {
    this.observer.disconnect();
  }

  addDivider() {
    this.line = this.appendChild(document.createElement("div"));
    this.line.className = "sd-divider";
    this.line.tabIndex = 0;
    this.line.setAttribute("role", "slider");
    this.line.setAttribute("aria-label", "Divider between the two pictures");
    this.line.append(document.createElement("span"));
    this.line.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      this.moveDivider(this.divider + step);
    });
  }

  addBar() {
    const bar = this.appendChild(document.createElement("div"));
    bar.className = "sd-bar";
    bar.addEventListener("pointerdown", (event) => event.stopPropagation());
    bar.addEventListener("dblclick", (event) => event.stopPropagation());
    if (this.left) bar.append(this.chooser("left"), this.chooser("right"));
    else bar.append(Object.assign(document.createElement("span"), { textContent: this.right.label, className: "sd-label" }));
    this.percent = Object.assign(document.createElement("output"), { className: "sd-percent" });
    const buttons = [["−", "Zoom out", () => this.zoom(1 / 1.5)], ["+", "Zoom in", () => this.zoom(1.5)], ["Fit", "Whole picture", () => this.fit()],
      ["1:1", "One pixel of the picture is one of the screen", () => this.zoomTo(1 / devicePixelRatio)],
      ["Full screen", "Fill the screen with the picture", () => (document.fullscreenElement ? document.exitFullscreen() : this.requestFullscreen())]];
    bar.append(this.percent);
    for (const [text, title, act] of buttons) {
      const button = bar.appendChild(Object.assign(document.createElement("button"), { textContent: text, title, type: "button" }));
      button.addEventListener("click", act);
    }
  }

  chooser(side) {
    const select = Object.assign(document.createElement("select"), { title: `Picture on the ${side}`, className: `sd-choose-${side}` });
    for (const picture of this.pictures) select.append(new Option(picture.label, picture.name, false, picture === this[side]));
    select.addEventListener("change", () => {
      this[side] = this.pictures.find((picture) => picture.name === select.value);
      this.draw();
    });
    return select;
  }

  resize() {
    const { clientWidth, clientHeight } = this;
    if (!clientWidth || !clientHeight) return;
    const fitted = this.scale === undefined || Math.abs(this.scale - this.fittingScale) < 1e-9;
    [this.canvas.width, this.canvas.height] = [clientWidth, clientHeight].map((side) => Math.round(side * devicePixelRatio));
    if (fitted) this.fit();
    else this.draw();
  }

  fit() {
    this.fittingScale = Math.min(this.clientWidth / this.right.width, this.clientHeight / this.right.height);
    this.scale = this.fittingScale;
    this.offset = [(this.clientWidth - this.right.width * this.scale) / 2, (this.clientHeight - this.right.height * this.scale) / 2];
    this.draw();
  }

  zoomTo(scale, at = [this.clientWidth / 2, this.clientHeight / 2]) {
    const next = Math.min(Math.max(scale, this.fittingScale / 2), MAX_SCALE);
    this.offset = this.offset.map((offset, i) => at[i] - ((at[i] - offset) * next) / this.scale);
    this.scale = next;
    this.draw();
  }

  zoom(factor, at) {
    this.zoomTo(this.scale * factor, at);
  }

  move(x, y) {
    this.offset = [this.offset[0] + x, this.offset[1] + y];
    this.draw();
  }

  moveDivider(share) {
    this.divider = Math.min(Math.max(share, 0), 1);
    this.draw();
  }

  draw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = 0;
      this.paint();
    });
  }

  paint() {
    // A picture never leaves the view altogether.
    const [width, height] = [this.clientWidth, this.clientHeight];
    const sides = [this.right.width * this.scale, this.right.height * this.scale];
    this.offset = this.offset.map((offset, i) => Math.min(Math.max(offset, 40 - sides[i]), [width, height][i] - 40));
    this.corner = this.offset.map((offset) => Math.round(offset * devicePixelRatio) / devicePixelRatio); // pixels meet pixels at 1:1
    const context = this.canvas.getContext("2d");
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.imageSmoothingEnabled = this.scale * devicePixelRatio < 2; // above, pixels are shown as squares
    context.imageSmoothingQuality = "high";
    const at = this.divider * width;
    if (this.left) {
      this.paintPart(context, this.left, 0, at);
      this.line.style.left = `${at}px`;
      this.line.setAttribute("aria-valuenow", Math.round(100 * this.divider));
    }
    this.paintPart(context, this.right, this.left ? at : 0, width);
    this.percent.textContent = `${Math.round(this.scale * devicePixelRatio * 100)} %`;
  }

  /** Draw a picture between two columns of the view: a coarse level first, then the one that the zoom needs. */
  paintPart(context, picture, from, to) {
    if (to <= from) return;
    const levels = Math.max(0, Math.ceil(Math.log2(Math.max(picture.width, picture.height) / TILE)));
    const wanted = Math.min(Math.max(Math.floor(-Math.log2(this.scale * devicePixelRatio)), 0), levels);
    context.save();
    context.beginPath();
    context.rect(from, 0, to - from, this.clientHeight);
    context.clip();
    for (const level of new Set([levels, wanted])) this.paintLevel(context, picture, level, from, to);
    context.restore();
  }

  paintLevel(context, picture, level, from, to) {
    const side = TILE * 2 ** level; // of a tile, in pixels of the picture
    const first = (edge, i) => Math.max(0, Math.floor((edge - this.offset[i]) / this.scale / side));
    const last = (edge, i, length) => Math.min(Math.ceil((edge - this.offset[i]) / this.scale / side), Math.ceil(length / side));
    for (let y = first(0, 1); y < last(this.clientHeight, 1, picture.height); y++) {
      for (let x = first(from, 0); x < last(to, 0, picture.width); x++) {
        const address = `scalediff/tiles/${picture.name}/${level}/${x}/${y}?v=${picture.version}`;
        const image = tileImage(address, () => this.draw());
        if (!image) continue;
        const [w, h] = [image.naturalWidth, image.naturalHeight].map((length) => length * 2 ** level * this.scale);
        context.drawImage(image, x * side * this.scale + this.corner[0], y * side * this.scale + this.corner[1], w, h);
      }
    }
  }

  place(event) {
    const box = this.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  onWheel(event) {
    event.preventDefault();
    this.zoom(2 ** (-event.deltaY / (event.deltaMode ? 8 : 320)), this.place(event));
  }

  onDown(event) {
    if (event.button) return;
    this.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, this.place(event));
    this.divides = Boolean(this.line?.contains(event.target));
    this.focus({ preventScroll: true });
  }

  onMove(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    const now = this.place(event);
    const other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
    this.pointers.set(event.pointerId, now);
    if (this.divides) this.moveDivider(now[0] / this.clientWidth);
    else if (other) this.zoom(Math.hypot(now[0] - other[0], now[1] - other[1]) / Math.hypot(before[0] - other[0], before[1] - other[1]), other);
    else this.move(now[0] - before[0], now[1] - before[1]);
  }

  onUp(event) {
    this.pointers.delete(event.pointerId);
    this.divides = false;
  }

  onDoubleClick(event) {
    if (Math.abs(this.scale - this.fittingScale) < 1e-9) this.zoomTo(Math.max(1, 2 * this.scale), this.place(event));
    else this.fit();
  }

  onKey(event) {
    const act = {
      "+": () => this.zoom(1.5), "=": () => this.zoom(1.5), "-": () => this.zoom(1 / 1.5), 0: () => this.fit(), 1: () => this.zoomTo(1 / devicePixelRatio),
      ArrowLeft: () => this.move(60, 0), ArrowRight: () => this.move(-60, 0), ArrowUp: () => this.move(0, 60), ArrowDown: () => this.move(0, -60),
    }[event.key];
    if (!act || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    act();
  }
}

customElements.define("scalediff-viewer", Viewer);
