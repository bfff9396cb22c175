"use strict";
(() => {
  // Texts may contain anything: the script writes text nodes only, never markup.
  const byId = (id) => document.getElementById(id);
  const state = { about: null, pins: [], found: null, sliders: new Map(), maps: new Map() };
  const READABLE = 400; // tokens up to which every strip is written out at once

  function element(tag, properties = {}, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  function number(value) {
    if (value === null || value === undefined) return "n/a";
    const size = Math.abs(value);
    if (Number.isInteger(value)) return value.toLocaleString("en");
    if (size >= 100) return value.toFixed(1);
    if (size >= 10) return value.toFixed(2);
    if (size > 0 && size < 0.001) return value.toExponential(1);
    return value.toFixed(3);
  }

  /** An answer of the server; an Error with its own words where it refuses. */
  async function ask(path, question) {
    const how = question === undefined ? {} : { method: "POST", body: JSON.stringify(question) };
    let answer;
    try {
      answer = await fetch(path, how);
    } catch {
      throw new Error("no answer: is `tcsae serve` still running?");
    }
    const text = await answer.text();
    let content = null;
    try { content = JSON.parse(text); } catch { /* a refusal in plain words */ }
    if (!answer.ok) throw new Error((content && content.error) || text || `error ${answer.status}`);
    return content;
  }

  /** Say where a request stands; only the latest of a kind is listened to. */
  const latest = new Map();
  async function latestOf(kind, place, work) {
    const turn = (latest.get(kind) || 0) + 1;
    latest.set(kind, turn);
    const begun = performance.now();
    place.className = "context-head";
    place.textContent = "…";
    try {
      const found = await work();
      if (latest.get(kind) !== turn) return null;
      place.textContent = `${((performance.now() - begun) / 1000).toFixed(1)} s`;
      return found;
    } catch (error) {
      if (latest.get(kind) === turn) {
        place.className = "context-head error";
        place.textContent = error.message;
      }
      return null;
    }
  }

  // ---------------------------------------------------------------- the runs

  const nameOf = (run) => state.about.runs[run].name;
  const labelOf = (run, feature) =>
    state.about.runs.length > 1 ? `${nameOf(run)}: ${feature}` : `feature ${feature}`;

  function describe() {
    const { runs, lead, model, hook, context_size, limits } = state.about;
    byId("about").textContent =
      `${model}, ${hook}; ${runs.map((run) => run.name).join(", ")}; contexts of ${context_size} tokens`;
    document.title = `tcsae: ${runs.map((run) => run.name).join(", ")}`;
    for (const id of ["lead", "pin-run", "steer-run", "map-run"]) {
      byId(id).replaceChildren(...runs.map((run, i) => {
        const option = element("option", { value: i, textContent: run.name });
        option.disabled = !run.measured && (id === "steer-run" || id === "map-run");
        return option;
      }));
      byId(id).value = lead;
      byId(id).closest("label").hidden = runs.length === 1;
    }
    byId("read-text").maxLength = limits.text;
    byId("prompt").maxLength = limits.prompt;
    byId("new-tokens").max = limits.new_tokens;
    byId("run-list").replaceChildren(...runs.map((run, i) => element("li", {},
      element("b", { textContent: run.name }), `, ${run.folder}: ${run.words} `,
      ...(run.report ? [link(`run/${i}/report.html`, "its report")] : []))));
  }

  const link = (href, textContent) =>
    element("a", { href, textContent, target: "_blank", rel: "noopener" });

  // ---------------------------------------------------------------- text in, strips out

  async function read() {
    const text = byId("read-text").value;
    const question = {
      text, lead: Number(byId("lead").value), by: byId("by").value,
      top: Number(byId("top").value), pins: state.pins,
    };
    const found = await latestOf("read", byId("read-said"), () => ask("api/read", question));
    if (!found) return;
    state.found = found;
    drawRows();
    byId("read-said").textContent =
      `${found.tokens.length} tokens` +
      (found.contexts > 1 ? ` in ${found.contexts} contexts, each read by itself` : "") +
      `, ${byId("read-said").textContent}`;
  }

  function drawRows() {
    const { rows } = state.found;
    byId("strips-lead").textContent = rows.length
      ? "Dark where a feature is near its largest value in this text; every strip has a scale of its own. A feature that stays on is a bar."
      : "No feature fires on these tokens.";
    byId("rows").replaceChildren(...rows.map(rowOf));
    document.querySelectorAll("#rows canvas").forEach(drawCells);
    document.body.dataset.read = String(Number(document.body.dataset.read || 0) + 1);
  }

  function rowOf(row) {
    const pinned = isPinned(row.run, row.feature);
    const head = element("div", { className: "row-head" },
      element("h3", { textContent: labelOf(row.run, row.feature) }),
      button(pinned ? "Unpin" : "Pin", () => togglePin(row.run, row.feature)),
      ...steerButton(row.run, row.feature, row.sides[row.run].mean));
    const sides = element("div", { className: "sides" }, ...row.sides.map((s) => sideOf(s, row)));
    sides.style.setProperty("--sides", row.sides.length);
    const whole = element("div", { className: "row" }, head, sides);
    whole.dataset.row = `${row.run}-${row.feature}`;
    return whole;
  }

  function button(textContent, act) {
    const one = element("button", { type: "button", className: "plain", textContent });
    one.addEventListener("click", act);
    return one;
  }

  function steerButton(run, feature, mean) {
    return mean === null ? [] : [button("Steer", () => addSlider(run, feature))];
  }

  function sideOf(side, row) {
    const counterpart = side.cosine === null ? "" : `, decoder cosine ${side.cosine}`;
    const here = side.on.length
      ? `on at ${side.on.length} tokens, at most ${side.longest} in a row, peak ${number(side.largest)}`
      : "it does not fire here";
    const canvas = element("canvas", { height: 1 });
    canvas.side = side;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${nameOf(side.run)}, feature ${side.feature}: ${here}`);
    const place = element("div");
    const node = element("div", { className: side.run === row.run ? "side lead-side" : "side" },
      element("h4", {}, `${nameOf(side.run)}: `,
        side.page ? link(side.page, `feature ${side.feature}`) : `feature ${side.feature}`),
      element("div", { className: "context-head", textContent: here + counterpart }),
      wordsOf(side), element("div", { className: "context-head", textContent: side.facts }),
      canvas, place);
    pointAt(canvas, (event) => {
      const box = canvas.getBoundingClientRect();
      const at = Math.floor((event.clientX - box.left) / box.width * state.found.tokens.length);
      return at >= 0 && at < state.found.tokens.length ? at : null;
    }, side);
    if (state.found.tokens.length <= READABLE) place.replaceWith(textOf(side));
    else place.append(button("Show the text", () => place.replaceWith(textOf(side))));
    return node;
  }

  function wordsOf(side) {
    return element("div", { className: "words" },
      ...side.words.map((word) => element("span", { className: "token", textContent: word })));
  }

  /** The text with a mark where the feature is on. */
  function textOf(side) {
    const { pieces, valid } = state.found;
    const values = valuesOf(side);
    const text = element("div", { className: "context-text", dir: "auto" });
    for (const [start, stop, shown] of pieces) {
      const span = element("span", { textContent: shown });
      span.dataset.at = start;
      let counted = false, largest = 0;
      for (let i = start; i < stop; i++) {
        counted = counted || Boolean(valid[i]);
        largest = Math.max(largest, values[i]);
      }
      if (!counted) span.className = "masked";
      else if (largest > 0) {
        const level = largest / side.largest;
        span.className = level > 0.7 ? "on strong" : "on";
        span.style.setProperty("--level", (0.12 + 0.78 * level).toFixed(2));
      }
      text.append(span, document.createElement("wbr"));
    }
    pointAt(text, (event) => {
      const at = event.target.dataset.at;
      return at === undefined ? null : Number(at);
    }, side);
    return text;
  }

  function valuesOf(side) {
    const values = new Float32Array(state.found.tokens.length);
    side.on.forEach((at, i) => { values[at] = side.values[i]; });
    return values;
  }

  function drawCells(canvas) {
    const { tokens, valid } = state.found;
    canvas.width = tokens.length;
    const context = canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    const mark = style.getPropertyValue("--mark"), line = style.getPropertyValue("--line");
    valuesOf(canvas.side).forEach((value, i) => {
      if (!valid[i]) context.fillStyle = line;
      else if (value > 0) context.fillStyle =
        `rgba(${mark}, ${0.15 + 0.85 * value / canvas.side.largest})`;
      else return;
      context.fillRect(i, 0, 1, 1);
    });
  }

  /** Value and position of the token under the pointer, marked in every strip of the row. */
  function pointAt(node, place, side) {
    const tell = (event) => {
      const at = place(event);
      if (at === null) return;
      const { tokens, valid, pieces } = state.found;
      const piece = pieces.find(([start, stop]) => start <= at && at < stop);
      const value = side.values[side.on.indexOf(at)];
      byId("where").textContent = `${JSON.stringify(tokens[at])} at ${at}: ` +
        (valid[at] ? number(value ?? 0) : "left out of every metric") +
        ` (${nameOf(side.run)}, feature ${side.feature})`;
      unmarked();
      if (piece) node.closest(".row").querySelectorAll(`[data-at="${piece[0]}"]`)
        .forEach((one) => one.classList.add("here"));
    };
    // A finger that moves scrolls; its tap is a click.
    node.addEventListener("pointermove", (event) => { if (event.pointerType !== "touch") tell(event); });
    node.addEventListener("click", tell);
  }

  const unmarked = () =>
    document.querySelectorAll("#rows .here").forEach((one) => one.classList.remove("here"));

  /** A tap or a click beside every token ends what `pointAt` showed. */
  function pointAway(event) {
    if (event.target.closest(".side canvas, .side [data-at]")) return;
    byId("where").textContent = state.unpointed;
    unmarked();
  }

  // ---------------------------------------------------------------- pins

  const isPinned = (run, feature) => state.pins.some(([r, f]) => r === run && f === feature);

  function togglePin(run, feature) {
    if (isPinned(run, feature))
      state.pins = state.pins.filter(([r, f]) => r !== run || f !== feature);
    else state.pins = [...state.pins, [run, feature]];
    drawPins();
    if (byId("read-text").value.trim()) read();
  }

  function drawPins() {
    byId("pins").replaceChildren(...state.pins.map(([run, feature]) => {
      const one = button(`${labelOf(run, feature)} ×`, () => togglePin(run, feature));
      one.classList.add("pin");
      one.title = "unpin";
      return one;
    }));
  }

  // ---------------------------------------------------------------- steering

  async function addSlider(run, feature) {
    const said = byId("steer-said");
    if (run !== Number(byId("steer-run").value)) {
      byId("steer-run").value = run;
      clearSliders();
    }
    if (state.sliders.has(feature)) return;
    if (state.sliders.size >= state.about.limits.steered) {
      said.className = "context-head error";
      said.textContent = `${state.about.limits.steered} features at most`;
      return;
    }
    const known = await latestOf("slider", said, () => ask(`api/feature/${run}/${feature}`));
    if (!known) return;
    if (known.mean === null) {
      said.className = "context-head error";
      said.textContent = `feature ${feature} never fired on the held-out text: it has no unit`;
      return;
    }
    said.textContent = "";
    state.sliders.set(feature, 2);
    const range = element("input", { type: "range", min: -5, max: 20, step: 0.5, value: 2,
      id: `slider-${feature}` });
    const output = element("output", { textContent: "2 ×" });
    range.addEventListener("input", () => { output.textContent = `${Number(range.value)} ×`; });
    range.addEventListener("change", () => {
      state.sliders.set(feature, Number(range.value));
      if (byId("prompt").value.trim()) steer();
    });
    const line = element("div", { className: "slider" },
      element("label", { htmlFor: range.id, textContent: `feature ${feature}` }), range, output,
      button("Remove", () => { state.sliders.delete(feature); line.remove(); }),
      element("small", { textContent: `mean where it is on: ${known.mean}. ${known.words.join(" ")}` }));
    byId("sliders").append(line);
  }

  function clearSliders() {
    state.sliders.clear();
    byId("sliders").replaceChildren();
  }

  async function steer() {
    const question = {
      prompt: byId("prompt").value, run: Number(byId("steer-run").value),
      strengths: [...state.sliders], tokens: Number(byId("new-tokens").value),
      temperature: Number(byId("temperature").value), seed: Number(byId("seed").value),
    };
    byId("continuations").classList.add("waiting");
    const found = await latestOf("steer", byId("steer-said"), () => ask("api/steer", question));
    if (!found) return;
    byId("continuations").classList.remove("waiting");
    byId("continuations").hidden = false;
    for (const name of ["plain", "steered"])
      byId(name).replaceChildren(
        element("span", { className: "prompt", textContent: found.prompt }), found[name]);
    document.body.dataset.steered = String(Number(document.body.dataset.steered || 0) + 1);
  }

  // ---------------------------------------------------------------- the map

  const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  let points = [], chosen = -1;

  function ramp(share) {
    const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
    const low = Math.min(Math.floor(at), RAMP.length - 2);
    return `rgb(${RAMP[low].map((c, i) => Math.round(c + (RAMP[low + 1][i] - c) * (at - low)))})`;
  }

  async function drawMap() {
    const run = Number(byId("map-run").value);
    if (!state.about.runs[run].measured) return;
    if (!state.maps.has(run)) {
      try {
        state.maps.set(run, await ask(`api/map/${run}`));
      } catch (error) {
        byId("map-feature").replaceChildren(
          element("p", { className: "missing", textContent: error.message }));
        return;
      }
    }
    const { names, values } = state.maps.get(run);
    const kinds = ["L", "C"].filter((key) => key in values && values[key].some((v) => v !== null));
    if (!kinds.length || !values.density.some((d) => d > 0)) {
      byId("map-feature").replaceChildren(
        element("p", { className: "missing", textContent: "Nothing was measured that could be drawn." }));
      return;
    }
    const up = byId("map-up");
    if (up.options.length !== kinds.length)
      up.replaceChildren(...kinds.map((key) => element("option", { value: key, textContent: names[key] })));
    place(values, up.value, kinds.find((key) => key !== up.value) || up.value, names);
    document.body.dataset.mapped = String(points.length);
  }

  /** Points in pixels: density in powers of ten, `up` as it is, `tint` in ranks. */
  function place(values, up, tint, names) {
    const canvas = byId("map-canvas");
    const box = canvas.getBoundingClientRect(), scale = window.devicePixelRatio || 1;
    canvas.width = box.width * scale;
    canvas.height = box.height * scale;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    const alive = values.density.map((d, i) => i)
      .filter((i) => values.density[i] > 0 && values[up][i] !== null);
    const logs = alive.map((i) => Math.log10(values.density[i]));
    const [least, most] = minMax(logs);
    const left = Math.floor(least), right = Math.ceil(most);
    const [low, high] = minMax([...alive.map((i) => values[up][i]), 0]);
    const [coolest, hottest] = minMax(alive.map((i) => values[tint][i]).filter((v) => v !== null));
    const frame = { x: 46, y: 10, w: box.width - 58, h: box.height - 48 };
    const x = (log) => frame.x + (log - left) / (right - left || 1) * frame.w;
    const y = (value) => frame.y + frame.h * (1 - (value - low) / (high - low || 1));
    axes(context, frame, { left, right, low, high, x, y, up: names[up] });
    points = alive.map((i, n) => ({ feature: i, x: x(logs[n]), y: y(values[up][i]) }));
    points.forEach((point) => {
      const value = values[tint][point.feature];
      context.fillStyle = value === null ? "#888" :
        ramp((value - coolest) / (hottest - coolest || 1));
      context.globalAlpha = 0.75;
      context.beginPath();
      context.arc(point.x, point.y, 2.6, 0, 7);
      context.fill();
    });
    context.globalAlpha = 1;
    byId("map-low").textContent = `colour: ${names[tint]} ${number(coolest)}`;
    byId("map-high").textContent = number(hottest);
    const here = points.find((point) => point.feature === chosen);
    if (here) {
      context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--bad");
      context.lineWidth = 2.5;
      context.beginPath();
      context.arc(here.x, here.y, 7, 0, 7);
      context.stroke();
    }
  }

  /** [least, largest]; spread into Math.min a long list would be too many arguments. */
  function minMax(list) {
    let low = Infinity, high = -Infinity;
    for (const value of list) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
    return [low, high];
  }

  function axes(context, frame, { left, right, low, high, x, y, up }) {
    const style = getComputedStyle(document.documentElement);
    context.strokeStyle = style.getPropertyValue("--grid");
    context.fillStyle = style.getPropertyValue("--soft");
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "center";
    for (let power = left; power <= right; power++) {
      stroke(context, x(power), frame.y, x(power), frame.y + frame.h);
      context.fillText(power === 0 ? "1" : `10^${power}`, x(power), frame.y + frame.h + 15);
    }
    context.fillText("density (share of tokens)", frame.x + frame.w / 2, frame.y + frame.h + 32);
    context.textAlign = "right";
    for (let i = 0; i <= 4; i++) {
      const value = low + (high - low) * i / 4;
      stroke(context, frame.x, y(value), frame.x + frame.w, y(value));
      context.fillText(value.toFixed(2), frame.x - 5, y(value) + 4);
    }
    context.textAlign = "left";
    context.fillText(up, frame.x + 4, frame.y + 12);
  }

  function stroke(context, x0, y0, x1, y1) {
    context.beginPath();
    context.moveTo(x0, y0);
    context.lineTo(x1, y1);
    context.stroke();
  }

  const REACH = 14; // pixels

  function clickMap(event) {
    const box = event.target.getBoundingClientRect();
    const at = { x: event.clientX - box.left, y: event.clientY - box.top };
    const far = (point) => Math.hypot(point.x - at.x, point.y - at.y);
    const nearest = points.reduce((best, one) => (best && far(best) <= far(one) ? best : one), null);
    if (nearest && far(nearest) <= REACH) choose(nearest.feature);
  }

  function keyMap(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !points.length) return;
    event.preventDefault();
    const sorted = [...points].sort((a, b) => a.x - b.x || a.y - b.y);
    const now = sorted.findIndex((point) => point.feature === chosen);
    choose(sorted[(now + step + sorted.length) % sorted.length].feature);
  }

  async function choose(feature) {
    chosen = feature;
    drawMap();
    const run = Number(byId("map-run").value);
    let known;
    try {
      known = await ask(`api/feature/${run}/${feature}`);
    } catch (error) {
      known = { words: [], facts: error.message, mean: null, page: null };
    }
    if (chosen !== feature) return;
    byId("map-feature").replaceChildren(element("div", { className: "card" },
      element("h3", { textContent: labelOf(run, feature) }), wordsOf(known),
      element("div", { className: "context-head", textContent: known.facts }),
      element("div", { className: "controls" },
        button("Pin", () => { if (!isPinned(run, feature)) togglePin(run, feature); }),
        ...steerButton(run, feature, known.mean),
        ...(known.page ? [link(known.page, "its page")] : []))));
  }

  // ---------------------------------------------------------------- begin

  const submitted = (id, act) => byId(id).addEventListener("submit", (event) => {
    event.preventDefault();
    act();
  });

  async function begin() {
    try {
      state.about = await ask("api/runs");
    } catch (error) {
      byId("about").textContent = error.message;
      return;
    }
    describe();
    state.unpointed = byId("where").textContent;
    for (const part of document.querySelectorAll("body > *")) part.addEventListener("click", pointAway);
    submitted("read-form", read);
    submitted("steer-form", steer);
    submitted("pin-form", () => {
      const run = Number(byId("pin-run").value), feature = Number(byId("pin-number").value);
      if (!isPinned(run, feature)) togglePin(run, feature);
    });
    for (const id of ["lead", "by", "top"])
      byId(id).addEventListener("change", () => { if (byId("read-text").value.trim()) read(); });
    byId("read-text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); read(); }
    });
    byId("steer-run").addEventListener("change", clearSliders);
    byId("steer-add").addEventListener("click", () => {
      if (byId("steer-number").value !== "")
        addSlider(Number(byId("steer-run").value), Number(byId("steer-number").value));
    });
    byId("map-run").addEventListener("change", () => { chosen = -1; byId("map-feature").replaceChildren(); drawMap(); });
    byId("map-up").addEventListener("change", drawMap);
    byId("map-canvas").addEventListener("click", clickMap);
    byId("map-canvas").addEventListener("keydown", keyMap);
    const again = () => {
      drawMap();
      document.querySelectorAll("#rows canvas").forEach(drawCells);
    };
    window.addEventListener("resize", () => drawMap());
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
    await drawMap();
    document.body.dataset.ready = "yes";
  }

  begin();
})();
