"use strict";
(() => {
  const page = JSON.parse(document.getElementById("report-data").textContent);
  const domainSelect = document.getElementById("choose-domain");
  const types = { f4: Float32Array, f8: Float64Array, u2: Uint16Array, u1: Uint8Array, i1: Int8Array,
    i2: Int16Array, i4: Int32Array, u4: Uint32Array };
  const state = { domain: "", dark: false };

  /** Rows of a matrix: plain arrays, or a typed array as base64 with a scale; a cell equal to `missing` is null. */
  function matrix(value) {
    if (Array.isArray(value) || !value || !value.bdata) return value;
    const bytes = Uint8Array.from(atob(value.bdata), (character) => character.charCodeAt(0));
    const flat = new types[value.dtype](bytes.buffer);
    const [rows, columns] = String(value.shape).split(",").map(Number);
    const scale = value.scale === undefined ? 1 : value.scale;
    return Array.from({ length: rows }, (_, row) => Array.from({ length: columns }, (_, column) => {
      const cell = flat[row * columns + column];
      return cell === value.missing || Number.isNaN(cell) ? null : cell * scale;
    }));
  }

  /** A copy with every colour of the light page replaced by that of the dark one. */
  function recoloured(value, key) {
    if (!state.dark) return value;
    if (key === "colorscale") {
      const diverging = Array.isArray(value) && page.diverging.every((colour, place) => (value[place] || [])[1] === colour);
      return diverging ? page.dark_diverging : value;
    }
    if (typeof value === "string") return page.dark[value] || value;
    if (Array.isArray(value)) return value.map((item) => recoloured(item));
    if (value && typeof value === "object" && !ArrayBuffer.isView(value)) {
      if (value.bdata !== undefined) return value;
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, recoloured(item, name)]));
    }
    return value;
  }

  /** What a figure shows for the chosen domain: its own traces, or those with the domain's values in them. */
  function current(figure) {
    const variant = figure.variants && figure.variants[state.domain];
    if (!variant) return { data: figure.data, layout: figure.layout };
    const data = variant.data.map((patch, index) => {
      const trace = { ...figure.data[Math.min(index, figure.data.length - 1)], ...patch, visible: true };
      if (patch.z) trace.z = matrix(patch.z);
      return trace;
    });
    return { data, layout: { ...figure.layout, ...(variant.layout || {}) } };
  }

  /** One layer of the figure named `of`, expert by expert. */
  function layerBars(figure) {
    const source = current(page.figures.find((other) => other.id === figure.of)).data[0];
    const layer = Number(document.getElementById("choose-layer").value);
    const experts = figure.experts[layer];
    const row = matrix(source.z)[layer].slice(0, experts);
    const order = Array.from(row.keys());
    if (document.getElementById("choose-order").value === "use") order.sort((a, b) => row[b] - row[a] || a - b);
    const ids = order.map(String);
    const data = [{ ...figure.data[0], x: ids, y: order.map((id) => row[id]), customdata: order.map((id) => row[id] * experts) }];
    const layout = { ...figure.layout, shapes: [{ ...figure.layout.shapes[0], y0: 1 / experts, y1: 1 / experts }] };
    layout.xaxis = { ...layout.xaxis, categoryorder: "array", categoryarray: ids };
    return { data, layout };
  }

  const viewSelect = (figure) => figure.views && document.getElementById(figure.id.replace("figure-", "choose-view-"));

  async function draw(figure) {
    const shown = figure.of ? layerBars(figure) : current(figure);
    const clone = typeof structuredClone === "function" ? structuredClone : (value) => JSON.parse(JSON.stringify(value));
    const spec = recoloured(clone(shown));
    const place = document.getElementById(figure.id);
    await Plotly.react(place, spec.data, spec.layout, page.config);
    const view = viewSelect(figure);
    if (view) {
      view.disabled = Boolean(figure.variants && figure.variants[state.domain]);
      view.title = view.disabled ? "One domain is shown in the measure of the report alone" : "";
      if (!view.disabled) await Plotly.update(place, ...figure.views[Number(view.value)].args);
    }
    place.dataset.drawn = "1";
  }

  function say() {
    for (const place of document.querySelectorAll(".shown")) {
      const varies = place.dataset.varies === "1";
      place.textContent = state.domain === "" ? "" : varies
        ? `Domain: ${domainSelect.selectedOptions[0].textContent.trim()}` : "All domains together.";
    }
  }

  /** Draw again what has been drawn; what has not been seen yet is drawn when it comes near. */
  async function redraw(filter) {
    for (const figure of page.figures) {
      const drawn = document.getElementById(figure.id).dataset.drawn;
      if (drawn && (!filter || filter(figure))) await draw(figure);
    }
  }

  function drawWhenNear() {
    const byId = new Map(page.figures.map((figure) => [figure.id, figure]));
    const observer = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        observer.unobserve(entry.target);
        draw(byId.get(entry.target.id));
      }
    }, { rootMargin: "400px 0px" });
    for (const id of byId.keys()) observer.observe(document.getElementById(id));
    window.addEventListener("beforeprint", () => {
      for (const figure of page.figures) if (!document.getElementById(figure.id).dataset.drawn) draw(figure);
    });
  }

  if (domainSelect) {
    domainSelect.addEventListener("change", () => {
      state.domain = domainSelect.value;
      say();
      redraw((figure) => figure.variants || figure.of);
    });
  }
  for (const figure of page.figures) {
    const select = viewSelect(figure);
    if (select) select.addEventListener("change", () => draw(figure));
  }
  for (const id of ["choose-layer", "choose-order"]) {
    const select = document.getElementById(id);
    if (select) select.addEventListener("change", () => redraw((figure) => figure.of));
  }

  state.dark = followTheme((dark) => {
    state.dark = dark;
    redraw();
  });
  if (domainSelect) domainSelect.value = "";
  say();
  drawWhenNear();
})();
