"use strict";
(() => {
  const page = JSON.parse(document.getElementById("view-data").textContent);
  const byId = (id) => document.getElementById(id);
  const types = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array };
  const column = Object.fromEntries(Object.entries(page.columns).map(([name, packed]) => [name, unpack(packed)]));
  const { layers, experts, top_k: topK, tokens: T, k: K, colours, modes, requests } = page;
  const L = layers.length;
  const E = Math.max(...experts);
  const state = { request: 0, layer: 0, mode: 0, expert: null, at: 0, kept: null, hovered: null };
  const means = new Map();
  let nodes = [];

  /** A typed array out of base64; all machines that browsers run on are little-endian. */
  function unpack(packed) {
    const text = atob(packed.bdata);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return new types[packed.dtype](bytes.buffer);
  }

  const request = () => requests[state.request];
  /** Where the experts of a token in a layer begin. */
  const cell = (layer, row) => (layer * T + row) * K;
  const share = (layer, place) => (column.shares ? column.shares[place] / 255 : 1 / topK[layer]);
  const value = (mode, layer, row) => column[mode.id][layer * T + row] * mode.scale;
  const use = (layer, expert) => column.use[layer * E + expert] * page.use_scale;
  const percent = (part) => `${(100 * part).toFixed(part < 0.0995 ? 1 : 0)}%`;
  const count = (number) => number.toLocaleString("en");
  const bucket = (mode, amount) => {
    const place = Math.floor(((amount - mode.low) / (mode.high - mode.low || 1)) * page.steps.length);
    return Math.min(Math.max(place, 0), page.steps.length - 1);
  };
  const shownText = (row) => page.texts ? page.texts[row] || "·" : `#${column.token[row]}`;
  const quoted = (row) => {
    const text = shownText(row).replace(/\n/g, "").trim();
    return `token ${count(column.position[row])} “\u2068${text.length > 20 ? `${text.slice(0, 19)}…` : text}\u2069”`;
  };

  function has(layer, row, expert) {
    const start = cell(layer, row);
    for (let j = 0; j < topK[layer]; j++) if (column.ids[start + j] === expert) return true;
    return false;
  }

  /** The experts that are first choice of most tokens in a layer, in order, each with its colour. */
  function leaders(layer) {
    const firsts = new Uint32Array(E);
    for (let row = 0; row < T; row++) firsts[column.ids[cell(layer, row)]]++;
    const order = Array.from(firsts.keys()).filter((expert) => firsts[expert])
      .sort((a, b) => firsts[b] - firsts[a] || a - b).slice(0, colours.length);
    const place = new Int8Array(E).fill(-1);
    order.forEach((expert, rank) => { place[expert] = rank; });
    return { order, place, firsts };
  }

  /** How often the request's tokens choose each expert, (L, E): a share of its tokens. */
  function requestMean() {
    if (!means.has(state.request)) {
      const { first, tokens } = request();
      const mean = new Float32Array(L * E);
      for (let layer = 0; layer < L; layer++) {
        for (let row = first; row < first + tokens; row++) {
          const start = cell(layer, row);
          for (let j = 0; j < topK[layer]; j++) mean[layer * E + column.ids[start + j]] += 1 / tokens;
        }
      }
      means.set(state.request, mean);
    }
    return means.get(state.request);
  }

  // ------------------------------------------------------------------------------------------------ tokens

  /** The elements of a request's tokens; made once, when it is chosen. */
  function layText() {
    const { first, tokens } = request();
    const all = document.createDocumentFragment();
    nodes = [];
    for (let row = first; row < first + tokens; row++) {
      const node = document.createElement("span");
      node.textContent = shownText(row);
      node.id = `token-${row}`;
      node.dataset.row = row;
      node.setAttribute("role", "option");
      nodes.push(node);
      all.append(node);
    }
    byId("text").replaceChildren(all);
    byId("text").scrollTop = 0;
  }

  function paintText(found) {
    const { first } = request();
    const { layer, expert } = state;
    const mode = modes[state.mode];
    const numbers = byId("numbers").checked;
    let hits = 0;
    nodes.forEach((node, place) => {
      const row = first + place;
      const chief = column.ids[cell(layer, row)];
      const rank = found.place[chief];
      let name = mode.id === "expert" ? (rank < 0 ? "rest" : `c${rank}`) : `s${bucket(mode, value(mode, layer, row))}`;
      if (expert !== null) {
        const hit = has(layer, row, expert);
        hits += hit;
        name += hit ? " hit" : " away";
      }
      if (column.generated[row]) name += " generated";
      if (row === state.kept) name += " kept";
      if (row === state.at) name += " at";
      if (node.className !== name) node.className = name;
      if (numbers) node.dataset.expert = chief;
    });
    byId("text").setAttribute("aria-activedescendant", `token-${state.at}`);
    for (const node of byId("text").querySelectorAll("[aria-selected]")) node.removeAttribute("aria-selected");
    nodes[state.at - first].setAttribute("aria-selected", "true");
    byId("chosen").textContent = expert === null ? "" : expert >= experts[layer]
      ? `Layer ${layers[layer]} has experts 0 to ${experts[layer] - 1}.`
      : `Expert ${expert} of layer ${layers[layer]}: ${count(hits)} of the request's ${count(nodes.length)} tokens `
        + `(${percent(hits / nodes.length)}; in the trace ${percent(use(layer, expert) * topK[layer])}).`;
  }

  const keys = colours.map((colour) => {
    const [button, swatch, text] = ["button", "span", "span"].map((tag) => document.createElement(tag));
    button.type = "button";
    swatch.className = "swatch";
    swatch.style.background = colour;
    button.append(swatch, text);
    button.addEventListener("click", () => choose(Number(button.dataset.expert)));
    return { button, text };
  });
  const others = document.createElement("span");
  const scale = document.createElement("span");
  const generated = document.createElement("span");
  generated.className = "key generated";
  generated.textContent = "underlined: generated";
  byId("legend").append(...keys.map((key) => key.button), others, scale);
  if (column.generated.includes(1)) byId("legend").append(generated);

  function paintLegend(found) {
    const mode = modes[state.mode];
    const named = mode.id === "expert";
    keys.forEach(({ button, text }, rank) => {
      button.hidden = !named || rank >= found.order.length;
      if (button.hidden) return;
      const expert = found.order[rank];
      button.dataset.expert = expert;
      text.textContent = `${expert} · ${count(found.firsts[expert])}`;
      button.setAttribute("aria-label", `Expert ${expert}, first of ${count(found.firsts[expert])} tokens; highlight it`);
      button.setAttribute("aria-pressed", String(expert === state.expert));
    });
    const rest = T - found.order.reduce((sum, expert) => sum + found.firsts[expert], 0);
    others.textContent = named && rest ? `without colour: other experts · ${count(rest)}` : "";
    scale.replaceChildren();
    if (!named) {
      const bar = document.createElement("span");
      bar.className = "gradient";
      bar.style.background = `linear-gradient(90deg, ${page.steps.join(",")})`;
      scale.append(`${mode.low.toFixed(2)} bits `, bar, ` ${mode.high.toFixed(2)} bits`);
    }
    byId("how").textContent = mode.how;
  }

  const rows = Array.from({ length: K }, () => {
    const line = byId("token-experts").insertRow();
    const [which, part, usual] = [line.insertCell(), line.insertCell(), line.insertCell()];
    const button = document.createElement("button");
    button.type = "button";
    button.addEventListener("click", () => choose(Number(button.dataset.expert)));
    which.append(button);
    const [bar, text] = [document.createElement("span"), document.createElement("span")];
    bar.className = "share";
    part.append(bar, text);
    return { line, button, bar, text, usual };
  });

  /** What there is to say of one token in the layer. */
  function paintToken() {
    const row = state.hovered ?? state.at;
    const { layer } = state;
    byId("token-text").textContent = shownText(row);
    byId("token-facts").textContent = `Token id ${column.token[row]} · position ${count(column.position[row])} · `
      + `${column.generated[row] ? "generated" : "prompt"} · layer ${layers[layer]}`;
    rows.forEach(({ line, button, bar, text, usual }, j) => {
      line.hidden = j >= topK[layer];
      const place = cell(layer, row) + j;
      const expert = column.ids[place];
      button.textContent = button.dataset.expert = expert;
      button.setAttribute("aria-label", `Expert ${expert}; highlight it`);
      button.setAttribute("aria-pressed", String(expert === state.expert));
      bar.style.width = `${Math.round(70 * share(layer, place))}px`;
      bar.hidden = !column.shares;
      text.textContent = column.shares ? percent(share(layer, place)) : "chosen";
      usual.textContent = line.hidden ? "" : percent(use(layer, expert) * topK[layer]);
    });
    byId("token-values").textContent = modes.slice(1)
      .map((mode) => `${mode.name} ${value(mode, layer, row).toFixed(2)} bits`).join(" · ");
  }

  // ------------------------------------------------------------------------------------------------ paths

  const strip = byId("strip");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /** Where things lie on the strip, in pixels of the page. */
  function stripPlan() {
    const left = 56;
    const width = Math.max(strip.clientWidth, 200);
    const high = Math.min(Math.max(560 / L, 8), 26);
    return { left, top: 22, high, wide: Math.min((width - left - 8) / E, 40), width, height: 22 + high * L + 6 };
  }

  function paintPath() {
    const plan = stripPlan();
    const ratio = window.devicePixelRatio || 1;
    [strip.width, strip.height] = [Math.round(plan.width * ratio), Math.round(plan.height * ratio)];
    strip.style.height = `${plan.height}px`;
    const pen = strip.getContext("2d");
    pen.scale(ratio, ratio);
    const { left, top, high, wide } = plan;
    const compare = byId("compare").value;
    const kept = compare === "other" ? state.kept : null;
    const colour = { line: css("--line"), faint: css("--faint"), ink: css("--ink"), own: css("--accent"), other: css("--other") };

    pen.font = "11px Inter, 'Helvetica Neue', Arial, sans-serif";
    pen.textBaseline = "middle";
    pen.fillStyle = colour.faint;
    pen.textAlign = "right";
    const every = Math.ceil(14 / high);
    layers.forEach((layer, place) => {
      if (place % every === 0) pen.fillText(layer, left - 8, top + high * (place + 0.5));
    });
    pen.textAlign = "center";
    const step = [1, 2, 4, 8, 16, 32, 64, 128].find((size) => size * wide >= 30) ?? 256;
    for (let expert = 0; expert < E; expert += step) pen.fillText(expert, left + wide * (expert + 0.5), 10);

    if (compare === "mean") {
      const mean = requestMean();
      const most = mean.reduce((a, b) => Math.max(a, b), 0);
      pen.fillStyle = colour.other;
      for (let place = 0; place < L * E; place++) {
        if (!mean[place]) continue;
        pen.globalAlpha = 0.75 * Math.sqrt(mean[place] / most);
        pen.fillRect(left + wide * (place % E), top + high * Math.floor(place / E), Math.max(wide - 0.5, 1), high - 0.5);
      }
      pen.globalAlpha = 1;
    }
    pen.strokeStyle = colour.line;
    for (let layer = 0; layer < L; layer++) {
      pen.strokeRect(left - 0.5, top + high * layer - 0.5, wide * experts[layer] + 1, high);
    }
    pen.strokeStyle = colour.ink;
    pen.lineWidth = 1.5;
    pen.strokeRect(left - 1, top + high * state.layer - 1, wide * experts[state.layer] + 2, high + 1);

    const centre = (layer, expert) => [left + wide * (expert + 0.5), top + high * (layer + 0.5)];
    const mark = (row, shade, ring) => {
      pen.strokeStyle = pen.fillStyle = shade;
      pen.globalAlpha = 0.45;
      pen.lineWidth = 1.2;
      pen.beginPath();
      for (let layer = 0; layer < L; layer++) pen.lineTo(...centre(layer, column.ids[cell(layer, row)]));
      pen.stroke();
      pen.globalAlpha = 1;
      for (let layer = 0; layer < L; layer++) {
        for (let j = 0; j < topK[layer]; j++) {
          const place = cell(layer, row) + j;
          const size = (high / 2 - 0.5) * (0.45 + 0.55 * Math.sqrt(share(layer, place)));
          pen.beginPath();
          pen.arc(...centre(layer, column.ids[place]), ring ? size + 1.5 : size, 0, 2 * Math.PI);
          if (ring) pen.stroke(); else pen.fill();
        }
      }
    };
    mark(state.at, colour.own, false);
    if (kept !== null) mark(kept, colour.other, true);
    const says = compare === "none" ? "" : kept !== null ? likeToken(kept) : likeMean();
    byId("path-says").textContent = says;
    strip.setAttribute("aria-label", `Experts of ${quoted(state.at)} in ${L} layers. ${says}`);
  }

  /** How a token's experts are used by the request: a sentence. */
  function likeMean() {
    const mean = requestMean();
    let [taken, even] = [0, 0];
    for (let layer = 0; layer < L; layer++) {
      for (let j = 0; j < topK[layer]; j++) taken += mean[layer * E + column.ids[cell(layer, state.at) + j]] / topK[layer] / L;
      even += topK[layer] / experts[layer] / L;
    }
    return `The experts of ${quoted(state.at)} get ${percent(taken)} of the request's selections in a layer on average; `
      + `were all used alike, it would be ${percent(even)}.`;
  }

  /** How many experts two tokens share: a sentence. */
  function likeToken(other) {
    if (other === state.at) return "This is the token that was kept: choose another to compare it with.";
    let [shared, chance, k, most, where] = [0, 0, 0, -1, 0];
    for (let layer = 0; layer < L; layer++) {
      let both = 0;
      for (let j = 0; j < topK[layer]; j++) both += has(layer, other, column.ids[cell(layer, state.at) + j]);
      if (both > most) [most, where] = [both, layer];
      shared += both / L;
      chance += topK[layer] ** 2 / experts[layer] / L;
      k += topK[layer] / L;
    }
    return `In a layer on average, ${quoted(state.at)} and ${quoted(other)} share ${shared.toFixed(2)} of ${k.toFixed(0)} experts `
      + `(independent and even choices: ${chance.toFixed(2)}); most in layer ${layers[where]}: ${most}.`;
  }

  /** Layer and expert under the mouse, or null. */
  function stripAt(event) {
    const { left, top, high, wide } = stripPlan();
    const layer = Math.floor((event.offsetY - top) / high);
    const expert = Math.floor((event.offsetX - left) / wide);
    return layer >= 0 && layer < L && expert >= 0 && expert < experts[layer] ? [layer, expert] : null;
  }

  // ------------------------------------------------------------------------------------------------ surfaces

  const SPACE = page.space;
  let libraryThere = null;

  /** plotly.js, unpacked when it is first needed. */
  function library() {
    libraryThere ??= (async () => {
      const packed = unpack({ dtype: "u1", bdata: byId("library").textContent });
      const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
      const script = document.createElement("script");
      script.textContent = await new Response(stream).text();
      document.head.append(script);
    })();
    return libraryThere;
  }

  const spaced = (length, most) => {
    const kept = Math.min(length, most);
    return Array.from({ length: kept }, (_, i) => Math.round((i * (length - 1)) / Math.max(kept - 1, 1)));
  };

  /** One surface a layer: experts across, tokens along, the share of each as height, stacked. */
  function stackedSurfaces(from, to) {
    const chosen = spaced(L, SPACE.stacked_layers);
    const total = new Float32Array(E);
    const heights = chosen.map((layer) => {
      const grid = Array.from({ length: to - from }, () => new Float32Array(E));
      grid.forEach((line, place) => {
        for (let j = 0; j < topK[layer]; j++) {
          const at = cell(layer, from + place) + j;
          line[column.ids[at]] = share(layer, at);
          total[column.ids[at]] += share(layer, at);
        }
      });
      return grid;
    });
    const shown = Array.from(total.keys()).sort((a, b) => total[b] - total[a] || a - b)
      .slice(0, SPACE.experts).sort((a, b) => a - b);
    const cut = heights.map((grid) => grid.map((line) => shown.map((expert) => line[expert])));
    const values = Float32Array.from(cut.flat(2)).sort();
    const gap = 1.25 * values[values.length - 1];
    const brightest = values[Math.round(SPACE.percentile / 100 * (values.length - 1))];
    const labels = tokenLabels(from, to);
    return {
      traces: cut.map((grid, place) => ({
        z: grid.map((line) => line.map((height) => height + gap * place)), surfacecolor: grid, customdata: grid,
        x: shown.map(String), y: labels, cmin: 0, cmax: brightest, showscale: place === chosen.length - 1,
        hovertemplate: `layer ${layers[chosen[place]]}, expert %{x}<br>token %{y}<br>share %{customdata:.1~%}<extra></extra>`,
      })),
      bar: "share", across: shown.length < E ? `Expert (${shown.length} most used of ${E})` : "Expert", along: "Token",
      ticks: { tickvals: chosen.map((_, place) => gap * place), ticktext: chosen.map((layer) => `layer ${layers[layer]}`) },
      says: `Tokens ${span(from, to)}; ${chosen.length === L ? `all ${L}` : `${chosen.length} of ${L}`} layers`
        + `${chosen.length === L ? "" : ", evenly spaced"}, one surface each, stacked. Height and colour are the share of `
        + `an expert in the token's ${column.shares ? "weight" : "selections, as no weights were traced"}.`,
    };
  }

  /** One surface of all: tokens across, layers along. */
  function singleSurface(from, to, mode) {
    const chosen = spaced(L, SPACE.layers);
    const grid = chosen.map((layer) => Array.from({ length: to - from }, (_, place) => mode.id === "expert"
      ? column.ids[cell(layer, from + place)] : value(mode, layer, from + place)));
    const name = mode.id === "expert" ? "index of the first expert" : mode.name;
    return {
      traces: [{
        z: grid, surfacecolor: grid, customdata: grid, x: tokenLabels(from, to), y: chosen.map((layer) => String(layers[layer])),
        showscale: true,
        hovertemplate: `token %{x}<br>layer %{y}<br>${name} %{z:.3~f}<extra></extra>`,
      }],
      bar: mode.id === "expert" ? "expert" : "bits", across: "Token", along: "Layer", ticks: { title: { text: name } },
      says: `Tokens ${span(from, to)}; ${chosen.length === L ? `all ${L} layers` : `${chosen.length} of ${L} layers, evenly spaced`}. `
        + `Height and colour are the ${name}.`,
    };
  }

  const span = (from, to) => `${count(column.position[from])} to ${count(column.position[to - 1])} of request ${request().number} `
    + `(${to - from === request().tokens ? "all" : `${count(to - from)} of ${count(request().tokens)}`})`;

  /** Labels of tokens on an axis; plotly reads markup in them. */
  function tokenLabels(from, to) {
    const plain = { "&": "&amp;", "<": "&lt;", ">": "&gt;" };
    return Array.from({ length: to - from }, (_, place) => {
      const text = shownText(from + place).replace(/\n/g, "").trim().slice(0, 12);
      return `${column.position[from + place]} ${text.replace(/[&<>]/g, (mark) => plain[mark])}`;
    });
  }

  async function drawSpace() {
    const stacked = byId("height").value === "";
    const { first, tokens } = request();
    const most = stacked ? SPACE.stacked_tokens : SPACE.tokens;
    const slider = byId("from");
    slider.max = Math.max(tokens - most, 0);
    slider.disabled = slider.max === "0";
    const from = first + Number(slider.value);
    const to = Math.min(from + most, first + tokens);
    byId("from-name").textContent = count(column.position[from]);
    const made = stacked ? stackedSurfaces(from, to) : singleSurface(from, to, modes[Number(byId("height").value)]);
    byId("space-says").textContent = `${made.says} Turn it with the mouse.`;
    byId("surface").setAttribute("aria-label", byId("space-says").textContent);
    try {
      await library();
    } catch (error) {
      byId("surface").textContent = "This browser cannot unpack the library that draws in three dimensions; a newer one can.";
      return;
    }
    const [ink, line, card] = ["--ink", "--line", "--card"].map(css);
    const axis = { gridcolor: line, backgroundcolor: "rgba(0,0,0,0)", showspikes: false, color: ink };
    const traces = made.traces.map((trace) => ({
      type: "surface", colorscale: page.scale, ...trace,
      contours: Object.fromEntries(["x", "y", "z"].map((name) => [name, { highlight: false }])),
      colorbar: { title: { text: `${made.bar}<br>&nbsp;` }, len: 0.7, thickness: 18, outlinewidth: 0 },
    }));
    await Plotly.react(byId("surface"), traces, {
      paper_bgcolor: card, font: { color: ink, family: "Inter, 'Helvetica Neue', Arial, sans-serif", size: 13 },
      margin: { l: 10, r: 10, b: 10, t: 10 }, uirevision: "same", autosize: true,
      hoverlabel: { bgcolor: card, bordercolor: line, font: { color: ink } },
      scene: {
        camera: SPACE.camera, aspectmode: "manual", aspectratio: { x: 1.3, y: 1.2, z: stacked ? 1.15 : 0.7 },
        xaxis: { ...axis, title: { text: made.across }, type: "category", nticks: 9 },
        yaxis: { ...axis, title: { text: made.along }, type: "category", nticks: 11 },
        zaxis: { ...axis, title: { text: "" }, ...made.ticks },
      },
    }, page.config);
    byId("surface").dataset.drawn = "1";
  }
  const redrawSpace = () => { if (byId("surface").dataset.drawn) drawSpace(); };

  // ------------------------------------------------------------------------------------------------ control

  let waiting = false;
  /** Paint what the state says, once a frame at most. */
  function refresh() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; paint(); });
  }

  function paint() {
    const found = leaders(state.layer);
    paintText(found);
    paintLegend(found);
    paintToken();
    paintPath();
    const name = `Layer ${layers[state.layer]}`;
    byId("layer-name").textContent = L > 1 ? `${name}, ${state.layer + 1} of ${L}` : name;
    byId("layer").setAttribute("aria-valuetext", name);
  }

  function setLayer(layer) {
    state.layer = Math.min(Math.max(layer, 0), L - 1);
    byId("layer").value = state.layer;
    byId("expert").max = experts[state.layer] - 1;
    refresh();
  }

  /** Highlight an expert; the same again, or null, ends it. */
  function choose(expert) {
    state.expert = expert === state.expert ? null : expert;
    byId("expert").value = state.expert ?? "";
    refresh();
  }

  function goTo(row, scroll) {
    const { first, tokens } = request();
    state.at = Math.min(Math.max(row, first), first + tokens - 1);
    state.hovered = null;
    if (scroll) nodes[state.at - first].scrollIntoView({ block: "nearest" });
    refresh();
  }

  function keep(row) {
    state.kept = row;
    const option = byId("compare").options[1];
    option.disabled = row === null;
    option.text = row === null ? "a token that was kept" : quoted(row);
    byId("compare").value = row === null ? "mean" : "other";
    refresh();
  }

  function setRequest(place) {
    state.request = place;
    state.at = request().first;
    state.hovered = null;
    byId("from").value = 0;
    layText();
    keep(null);
    redrawSpace();
  }

  /** The token above or below: on the next line that way, nearest to the same place. */
  function lineAway(direction) {
    const { first } = request();
    const here = nodes[state.at - first];
    let [best, line, apart] = [state.at, null, Infinity];
    for (let place = state.at - first + direction; nodes[place]; place += direction) {
      const node = nodes[place];
      if (node.offsetTop === here.offsetTop || (line === null && (node.offsetTop - here.offsetTop) * direction < 0)) continue;
      line ??= node.offsetTop;
      if (node.offsetTop !== line) break;
      const distance = Math.abs(node.offsetLeft - here.offsetLeft);
      if (distance < apart) [best, apart] = [first + place, distance];
    }
    return best;
  }

  const keyboard = {
    ArrowRight: () => goTo(state.at + 1, true),
    ArrowLeft: () => goTo(state.at - 1, true),
    ArrowDown: () => goTo(lineAway(1), true),
    ArrowUp: () => goTo(lineAway(-1), true),
    Home: () => goTo(0, true),
    End: () => goTo(T, true),
    ",": () => setLayer(state.layer - 1),
    ".": () => setLayer(state.layer + 1),
    e: () => choose(column.ids[cell(state.layer, state.at)]),
    c: () => keep(state.at),
    Escape: () => choose(null),
  };
  byId("text").addEventListener("keydown", (event) => {
    const act = keyboard[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  });
  const rowOf = (event) => (event.target.dataset.row === undefined ? null : Number(event.target.dataset.row));
  byId("text").addEventListener("click", (event) => { if (rowOf(event) !== null) goTo(rowOf(event), false); });
  byId("text").addEventListener("mouseover", (event) => {
    if (rowOf(event) === state.hovered) return;
    state.hovered = rowOf(event);
    paintToken();
  });
  byId("text").addEventListener("mouseleave", () => { state.hovered = null; paintToken(); });

  byId("layer").max = L - 1;
  byId("layer").addEventListener("input", () => setLayer(Number(byId("layer").value)));
  byId("request").append(...requests.map(({ number, domain, tokens, length }, place) => new Option(
    `${number} · ${domain} · ${tokens < length ? `${count(tokens)} of ${count(length)}` : count(length)} tokens`, place)));
  byId("request").addEventListener("change", () => setRequest(Number(byId("request").value)));
  byId("colour").append(...modes.map((mode, place) => new Option(mode.name, place)));
  byId("colour").addEventListener("change", () => { state.mode = Number(byId("colour").value); refresh(); });
  byId("expert").addEventListener("input", () => {
    const text = byId("expert").value;
    state.expert = /^\d+$/.test(text) ? Number(text) : null;
    refresh();
  });
  byId("numbers").addEventListener("change", () => {
    byId("text").classList.toggle("numbered", byId("numbers").checked);
    refresh();
  });
  byId("mark").addEventListener("click", () => keep(state.at));
  byId("compare").addEventListener("change", refresh);
  strip.addEventListener("click", (event) => { const found = stripAt(event); if (found) setLayer(found[0]); });
  strip.addEventListener("mousemove", (event) => {
    const found = stripAt(event);
    byId("path-at").textContent = found ? `Layer ${layers[found[0]]}, expert ${found[1]}: chosen by `
      + `${percent(requestMean()[found[0] * E + found[1]])} of the request's tokens.` : "";
  });
  byId("height").append(new Option("share of each expert", ""),
    ...modes.map((mode, place) => new Option(mode.id === "expert" ? "index of the first expert" : mode.name, place)));
  byId("height").addEventListener("change", drawSpace);
  byId("from").addEventListener("change", drawSpace);
  byId("from").addEventListener("input", () => {
    byId("from-name").textContent = count(column.position[request().first + Number(byId("from").value)]);
  });
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    drawSpace();
  }, { rootMargin: "200px 0px" }).observe(byId("surface"));
  new ResizeObserver(refresh).observe(strip.parentElement);

  followTheme(() => {
    refresh();
    redrawSpace();
  });

  byId("text").classList.toggle("ids", !page.texts);
  byId("request").value = "0";
  byId("colour").value = "0";
  byId("expert").value = "";
  byId("numbers").checked = false;
  setLayer(0);
  setRequest(0);
})();
