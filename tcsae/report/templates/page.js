"use strict";
(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  const { figures, data } = content;

  // ---------------------------------------------------------------- small helpers

  const byId = (id) => document.getElementById(id);

  /** An element with properties and children; strings become text nodes, never markup. */
  function element(tag, properties = {}, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  function number(value) {
    if (value === null || value === undefined) return "n/a";
    const size = Math.abs(value);
    if (Number.isInteger(value)) return value.toLocaleString("en");
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    if (size >= 100) return value.toFixed(1);
    if (size >= 10) return value.toFixed(2);
    if (size > 0 && size < 0.001) return value.toExponential(1);
    return value.toFixed(3);
  }

  /** A typed array from what page.py packed. */
  function unpacked(array) {
    const kinds = {
      int8: Int8Array, uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array,
      int32: Int32Array, float32: Float32Array,
    };
    const text = atob(array.data);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return new kinds[array.dtype](bytes.buffer);
  }

  // ---------------------------------------------------------------- figures

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /** The layout in the colours of the page as it is now. */
  function themed(layout) {
    const text = colour("--text"), grid = colour("--grid"), line = colour("--line");
    const result = { ...layout, font: { color: text, size: 13, family: "system-ui, sans-serif" } };
    for (const key of Object.keys(layout)) {
      if (!/^[xy]axis\d*$/.test(key)) continue;
      result[key] = {
        gridcolor: grid, linecolor: line, zerolinecolor: colour("--soft"), zeroline: false,
        exponentformat: "e", ...layout[key],
      };
    }
    if (layout.annotations)
      result.annotations = layout.annotations.map((a) => ({ bgcolor: colour("--back"), ...a }));
    result.modebar = { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: text };
    result.hoverlabel = { bgcolor: colour("--panel"), bordercolor: line, font: { color: text } };
    return result;
  }

  const options = {
    responsive: true, displaylogo: false,
    // Without a pointer that hovers the buttons would always cover the figure.
    displayModeBar: window.matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };

  const NARROW = 500;

  /** On a phone: no higher than wide, and no names over the points. */
  function fitted(layout, width) {
    if (width >= NARROW) return layout;
    return { ...layout, height: Math.min(layout.height, Math.max(width, 240)),
      annotations: [] };
  }

  function draw(place, figure) {
    const layout = themed(fitted(figure.layout, place.clientWidth));
    return Plotly.react(place, figure.data, layout, options);
  }

  const places = [...document.querySelectorAll("[data-figure]")];
  const redraw = () => places.forEach((place) => {
    if (place.layout) draw(place, figures[place.dataset.figure]);
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  window.matchMedia("print").addEventListener("change", redraw);

  /** One figure after the other, so that the page answers while they are drawn. */
  async function drawAll() {
    for (const place of places) {
      await draw(place, figures[place.dataset.figure]);
      place.on("plotly_click", (event) => {
        const feature = event.points[0].customdata;
        if (data.features && Number.isInteger(feature)) openFeature(feature);
      });
      await new Promise((resolve) => setTimeout(resolve));
    }
    document.body.dataset.drawn = "all";
  }

  // ---------------------------------------------------------------- the table of features

  const CHUNK = 100;
  let order = [], shown = 0, sortKey = null, descending = true;

  function tableOfFeatures() {
    const { columns } = data.features;
    const head = byId("features-head");
    for (const column of columns) {
      const button = element("button", { className: "sort", type: "button",
        textContent: column.name, title: column.meaning });
      button.addEventListener("click", () => sortBy(column.key));
      const cell = element("th", { scope: "col" }, button);
      cell.dataset.key = column.key;
      if (column.text) cell.classList.add("text");
      head.append(cell);
    }
    byId("features-search").addEventListener("input", filter);
    byId("features-rows").addEventListener("scroll", (event) => {
      const box = event.target;
      if (box.scrollTop + box.clientHeight > box.scrollHeight - 400) moreRows();
    });
    byId("features-body").addEventListener("click", (event) => {
      const row = event.target.closest("tr");
      if (row) openFeature(Number(row.dataset.feature));
    });
    sortBy(data.features.first_sort);
  }

  const column = (key) => data.features.columns.find((c) => c.key === key);

  function haystack(row) {
    const f = data.features;
    f.haystacks ??= new Array(f.ids.length);
    f.haystacks[row] ??= [f.ids[row], clusterName(row), ...(f.tokens[row] ?? [])]
      .join(" ").toLowerCase();
    return f.haystacks[row];
  }

  function clusterName(row) {
    const cluster = data.features.cluster[row];
    if (cluster === null || cluster < 0) return "";
    return `cluster ${cluster} · ${data.features.cluster_names[cluster] ?? ""}`;
  }

  function sortBy(key) {
    descending = key === sortKey ? !descending : !(column(key).text || key === "id");
    sortKey = key;
    for (const cell of byId("features-head").children) {
      const sorted = cell.dataset.key === key;
      cell.ariaSort = sorted ? (descending ? "descending" : "ascending") : null;
      const name = column(cell.dataset.key).name;
      cell.firstChild.textContent = sorted ? `${name} ${descending ? "↓" : "↑"}` : name;
    }
    filter();
  }

  function sortValue(row) {
    const f = data.features;
    if (sortKey === "id") return f.ids[row];
    if (sortKey === "cluster") return f.cluster[row] < 0 ? null : f.cluster[row];
    if (sortKey === "tokens") return f.tokens[row]?.[0]?.trim().toLowerCase() || null;
    return f.values[sortKey][row];
  }

  const CONDITION = /([^\s<>=]+)\s*(<=|>=|<|>|=)\s*(-?\d*\.?\d+(?:e[+-]?\d+)?)(?=\s|$)/gi;
  const holds = {
    "<": (x, y) => x < y, ">": (x, y) => x > y, "=": (x, y) => x === y,
    "<=": (x, y) => x <= y, ">=": (x, y) => x >= y,
  };
  const plainName = (text) => text.toLowerCase().replaceAll("²", "2").replace(/[^a-z0-9]/g, "");

  /** The key of the column that a condition names: its key or heading, or C, L, D for a window's. */
  function columnNamed(name) {
    const keys = data.features.columns.filter((c) => !c.text || c.key === "id");
    const wanted = plainName(name);
    return (keys.find((c) => plainName(c.key) === wanted || plainName(c.name) === wanted) ??
      keys.find((c) => /^[CLD]_\d+$/.test(c.key) && plainName(c.key[0]) === wanted))?.key;
  }

  /** What is asked for: conditions on columns ("L>.2 density<.05"), and the text that is left. */
  function asked(text) {
    const conditions = [], unknown = [];
    const left = text.replace(CONDITION, (_, name, sign, value) => {
      const key = columnNamed(name);
      if (key === undefined) unknown.push(name);
      else conditions.push({ key, holds: holds[sign], value: Number(value) });
      return " ";
    });
    return { conditions, unknown, wanted: left.trim().replace(/\s+/g, " ").toLowerCase() };
  }

  function meets(row, { key, holds, value }) {
    const own = key === "id" ? data.features.ids[row] : data.features.values[key][row];
    return own !== null && holds(own, value);
  }

  function filter() {
    const { conditions, unknown, wanted } = asked(byId("features-search").value);
    const keys = data.features.ids.map((_, row) => sortValue(row));
    order = [...data.features.ids.keys()].filter((row) =>
      conditions.every((condition) => meets(row, condition))).filter((row) =>
      !wanted || (/^\d+$/.test(wanted) && data.features.ids[row] === Number(wanted)) ||
      haystack(row).includes(wanted));
    const sign = descending ? -1 : 1;
    order.sort((a, b) => {
      const [x, y] = [keys[a], keys[b]];
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (x < y ? -1 : x > y ? 1 : 0) || a - b;
    });
    byId("features-count").textContent =
      `${order.length.toLocaleString("en")} of ${data.features.ids.length.toLocaleString("en")} features` +
      unknown.map((name) => `; there is no column ${name}`).join("");
    byId("features-body").replaceChildren();
    byId("features-rows").scrollTop = 0;
    shown = 0;
    moreRows();
  }

  function moreRows() {
    const rows = order.slice(shown, shown + CHUNK).map(tableRow);
    shown += rows.length;
    byId("features-body").append(...rows);
  }

  function tokenList(tokens) {
    return (tokens ?? []).map((text) => element("span", { className: "token" }, visible(text)));
  }

  /** Text of a token with its white space shown. */
  const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·");

  function tableRow(row) {
    const f = data.features;
    const line = element("tr");
    line.dataset.feature = f.ids[row];
    if (!f.live[row]) line.className = "dead";
    for (const { key } of f.columns) {
      if (key === "id") {
        line.append(element("td", {}, element("button",
          { className: "link", type: "button" }, String(f.ids[row]))));
      } else if (key === "tokens") {
        line.append(element("td", { className: "text tokens" }, ...tokenList(f.tokens[row])));
      } else if (key === "cluster") {
        line.append(element("td", { className: "text tokens" }, clusterName(row)));
      } else {
        line.append(element("td", {}, number(f.values[key][row])));
      }
    }
    return line;
  }

  // ---------------------------------------------------------------- one feature

  let current = null;

  function openFeature(feature) {
    const row = data.features.ids.indexOf(feature);
    if (row < 0) return;
    current = row;
    const dialog = byId("feature");
    byId("feature-title").textContent = `Feature ${feature}` +
      (data.features.live[row] ? "" : " (never fired)");
    byId("feature-cluster").textContent = clusterName(row);
    byId("feature-tokens").replaceChildren(...tokenList(data.features.tokens[row]));
    byId("feature-facts").replaceChildren(...data.features.columns
      .filter(({ key }) => key in data.features.values)
      .map(({ key, name, meaning }) => element("div", { title: meaning },
        element("span", {}, name), element("span", {}, number(data.features.values[key][row])))));
    byId("feature-lens").replaceChildren(...logitLens(row));
    byId("feature-partners").replaceChildren(...partners(feature));
    byId("feature-contexts").replaceChildren(...contexts(row));
    byId("feature-document").replaceChildren(...alongDocument(row));
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    history.replaceState(null, "", `#feature-${feature}`);
    drawFeature(row);
  }

  function step(by) {
    const at = order.indexOf(current) + by;
    if (at >= 0 && at < order.length) openFeature(data.features.ids[order[at]]);
  }

  function drawFeature(row) {
    const curves = data.features.curves;
    const slice = (packedCurve, scale) => {
      packedCurve.values ??= unpacked(packedCurve);
      const n = packedCurve.shape[1];
      return Array.from(packedCurve.values.subarray(row * n, (row + 1) * n), (v) =>
        v === packedCurve.missing ? null : v * scale);
    };
    const axis = (title) => ({ title: { text: title } });
    const margin = { l: 55, r: 10, t: 10, b: 45 };
    const clear = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
    const rho = slice(curves.rho, 1 / 10000);
    draw(byId("feature-rho"), {
      data: [{ x: rho.map((_, k) => k).slice(1), y: rho.slice(1), mode: "lines+markers",
        line: { color: "#0072B2" }, marker: { size: 4 }, hovertemplate: "lag %{x}: %{y:.3f}<extra></extra>" }],
      layout: { height: 220, margin, ...clear, xaxis: axis("lag, tokens"),
        yaxis: { ...axis("rho"), zeroline: true } },
    });
    const rate = slice(curves.rate, curves.rate_scale[row] / 255);
    draw(byId("feature-profile"), {
      data: [{ x: curves.positions, y: rate, mode: "lines", fill: "tozeroy",
        line: { color: "#009E73" }, hovertemplate: "position %{x}: %{y:.3g}<extra></extra>" }],
      layout: { height: 220, margin, ...clear, xaxis: axis("position"),
        yaxis: { ...axis("firing rate"), rangemode: "tozero" } },
    });
  }

  function featureLink(feature) {
    const button = element("button", { className: "link", type: "button" }, String(feature));
    button.addEventListener("click", () => openFeature(feature));
    return button;
  }

  function logitLens(row) {
    const lens = data.features.lens;
    const at = lens ? lens.row[row] : -1;
    if (at < 0) return [];
    return [["raised", "Raises"], ["lowered", "Lowers"]].map(([name, said]) => {
      lens[name].values ??= unpacked(lens[name]);
      const k = lens[name].shape[1];
      const of = Array.from(lens[name].values.subarray(at * k, (at + 1) * k));
      return element("p", { title: "logits of the next token, by the feature's direction alone" },
        `${said}: `, ...tokenList(of.map((i) => lens.vocabulary[i])));
    });
  }

  function partners(feature) {
    const lines = [];
    const row = data.features.ids.indexOf(feature);
    const { nearest, cosine, together } = data.features.neighbours;
    const said = (other) => {
      const tokens = data.features.tokens[data.features.ids.indexOf(other)] ?? [];
      return [featureLink(other), " ", ...tokenList(tokens)];
    };
    if (nearest[row] !== null) {
      lines.push(element("p", {}, "Nearest direction: feature ", ...said(nearest[row]),
        ` (decoder cosine ${number(cosine[row])})`));
    }
    for (const [other, r] of together[row].filter(([o]) => data.features.ids.includes(o))) {
      lines.push(element("p", {}, "Fires with: feature ", ...said(other), ` (correlation ${number(r)})`));
    }
    for (const kind of data.features.pairs) {
      for (const [first, second, correlation, cosine, lag] of kind.rows) {
        if (first !== feature && second !== feature) continue;
        const other = first === feature ? second : first;
        const late = first === feature ? lag : -lag;
        const when = late ? `, ${Math.abs(late)} tokens ${late > 0 ? "later" : "earlier"}` : "";
        lines.push(element("p", {}, `${kind.name}: feature `, featureLink(other),
          ` (correlation ${number(correlation)}, decoder cosine ${number(cosine)}${when})`));
      }
    }
    return lines;
  }

  // ---------------------------------------------------------------- its top contexts

  const AROUND = 24;

  function topContexts() {
    const top = data.features.top;
    if (top && !top.start) {
      for (const name of ["ids", "valid", "context", "position", "value", "count", "at", "level"])
        top[name].values = unpacked(top[name]);
      const counts = top.count.values;
      top.start = new Int32Array(counts.length + 1);
      for (let i = 0; i < counts.length; i++) top.start[i + 1] = top.start[i] + counts[i];
      top.whole = new Map();  // context -> place -> the piece of several tokens that holds it
      for (const [context, from, to, text] of top.joined) {
        if (!top.whole.has(context)) top.whole.set(context, new Map());
        for (let i = from; i < to; i++) top.whole.get(context).set(i, { from, to, text });
      }
    }
    return top;
  }

  function contexts(row) {
    const top = topContexts();
    if (!top) return [element("p", { className: "missing" }, data.features.top_reason)];
    const k = top.context.shape[1], found = [];
    const own = data.features.top_row[row];
    if (own < 0) return [element("p", { className: "missing" }, data.features.top_reason)];
    for (let i = own * k; i < (own + 1) * k; i++)
      if (top.context.values[i] >= 0) found.push(contextBlock(top, i));
    return found.length ? found : [element("p", {}, "It never fired on held-out text.")];
  }

  function contextBlock(top, entry) {
    const length = top.ids.shape[1], context = top.context.values[entry];
    const peak = top.position.values[entry], value = top.value.values[entry];
    const k = top.context.shape[1], largest = top.value.values[entry - entry % k];
    const level = new Float32Array(length);
    for (let i = top.start[entry]; i < top.start[entry + 1]; i++)
      level[top.at.values[i]] = top.level.values[i] / 255;
    const text = element("div", { className: "context-text", dir: "auto" });
    const fill = (from, to) => {
      const spans = [];
      let at = top.whole.get(context)?.get(from)?.from ?? from;
      while (at < to) {
        const piece = top.whole.get(context)?.get(at) ?? { from: at, to: at + 1 };
        spans.push(pieceSpan(top, context, piece, level, largest, peak));
        at = piece.to;
      }
      text.replaceChildren(...(from > 0 ? ["… "] : []), ...spans, ...(to < length ? [" …"] : []));
    };
    const near = () => fill(Math.max(0, peak - AROUND), Math.min(length, peak + AROUND + 1));
    near();
    const button = element("button", { className: "link", type: "button" }, "whole context");
    let whole = false;
    button.addEventListener("click", () => {
      whole = !whole;
      button.textContent = whole ? "around the peak" : "whole context";
      if (whole) fill(0, length); else near();
    });
    const head = element("div", { className: "context-head" },
      `peak ${number(value)} at position ${peak}, held-out context ${top.numbers[context]} `, button);
    return element("div", { className: "context" }, head, text);
  }

  /** Tokens that make whole characters together, as a rule one: marked by its largest activation. */
  function pieceSpan(top, context, piece, level, largest, peak) {
    const start = context * top.ids.shape[1];
    const places = Array.from({ length: piece.to - piece.from }, (_, i) => piece.from + i);
    const texts = places.map((at) => top.vocabulary[top.ids.values[start + at]]);
    const text = piece.text ?? texts[0];
    if (!places.some((at) => top.valid.values[start + at])) return element("span",
      { className: "masked", title: "left out of every metric" }, text.replaceAll("\n", "⏎"));
    const strongest = Math.max(...places.map((at) => level[at]));
    if (!strongest) return document.createTextNode(text.replaceAll("\n", "⏎\n"));
    const one = places.length === 1;
    const title = places.map((at, i) => (one ? "" : `${texts[i]} `) +
      `${number(level[at] * largest)} at position ${at}`).join("; ");
    const mark = element("mark", { title }, text.replaceAll("\n", "⏎\n"));
    mark.style.setProperty("--level", (0.12 + 0.78 * strongest).toFixed(2));
    mark.classList.toggle("strong", strongest > 0.7);
    mark.classList.toggle("peak", places.includes(peak));
    return mark;
  }

  // ---------------------------------------------------------------- along one document

  function documentData() {
    const passage = data.document;
    if (passage && !passage.start) {
      for (const name of ["stops", "valid", "count", "at", "level"])
        passage[name].values = unpacked(passage[name]);
      const counts = passage.count.values;
      passage.start = new Int32Array(counts.length + 1);
      for (let i = 0; i < counts.length; i++) passage.start[i + 1] = passage.start[i] + counts[i];
    }
    return passage;
  }

  /** Activation at each place, 0 to 1, of the feature in a row of the table. */
  function documentLevels(passage, row) {
    const level = new Float32Array(passage.valid.values.length);
    for (let i = passage.start[row]; i < passage.start[row + 1]; i++)
      level[passage.at.values[i]] = passage.level.values[i] / 255;
    return level;
  }

  function documentText(passage, row) {
    const level = documentLevels(passage, row), spans = [];
    let from = 0;
    passage.texts.forEach((text, i) => {
      const stop = passage.stops.values[i];
      let strongest = 0, counts = false;
      for (let at = from; at < stop; at++) {
        strongest = Math.max(strongest, level[at]);
        counts ||= Boolean(passage.valid.values[at]);
      }
      const shown = text.replaceAll("\n", "⏎\n");
      if (!counts) spans.push(element("span", { className: "masked" }, shown));
      else if (!strongest) spans.push(shown);
      else {
        const mark = element("mark",
          { title: `${number(strongest * passage.peak[row])} at place ${from}` }, shown);
        mark.style.setProperty("--level", (0.12 + 0.78 * strongest).toFixed(2));
        mark.classList.toggle("strong", strongest > 0.7);
        spans.push(mark);
      }
      from = stop;
    });
    return spans;
  }

  /** A row of cells, a pixel a token, stretched to the width of its place. */
  function documentCells(passage, row) {
    const level = documentLevels(passage, row);
    const canvas = element("canvas", { className: "cells", width: level.length, height: 1 });
    const pen = canvas.getContext("2d");
    level.forEach((value, at) => {
      if (!passage.valid.values[at]) pen.fillStyle = "rgba(128,128,128,.35)";
      else if (value) pen.fillStyle = `rgba(230,159,0,${(0.2 + 0.8 * value).toFixed(2)})`;
      else return;
      pen.fillRect(at, 0, 1, 1);
    });
    return canvas;
  }

  /** The text marked by a feature, in a box that shows the first place where it is strong. */
  function fillDocument(box, passage, row) {
    box.replaceChildren(...documentText(passage, row));
    const first = box.querySelector("mark.strong") ?? box.querySelector("mark");
    box.scrollTop = first ? Math.max(0, first.offsetTop - box.offsetTop - 60) : 0;
  }

  function alongDocument(row) {
    const passage = documentData();
    if (!passage) return [element("p", { className: "missing" }, "There is none in this run's analysis.")];
    const n = passage.count.values[row];
    if (!n) return [element("p", {}, "It does not fire there.")];
    const box = element("div", { className: "context-text document-text", dir: "auto", tabIndex: 0 });
    setTimeout(() => fillDocument(box, passage, row));  // when it has its place
    return [element("div", { className: "context-head" },
      `on at ${number(n)} tokens, peak ${number(passage.peak[row])}`),
      documentCells(passage, row), box];
  }

  function documentRows() {
    const passage = documentData(), rows = [...document.querySelectorAll("#document-rows [data-row]")];
    if (!passage || !rows.length) return;
    const choose = (line) => {
      const feature = Number(line.dataset.row), row = data.features.ids.indexOf(feature);
      for (const other of rows) other.classList.toggle("chosen", other === line);
      byId("document-said").textContent = `The text, marked where feature ${feature} is on:`;
      fillDocument(byId("document-text"), passage, row);
    };
    for (const line of rows) line.addEventListener("click", () => choose(line));
    choose(rows[0]);
  }

  // ---------------------------------------------------------------- start

  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(byId(button.dataset.copy).textContent);
      button.textContent = "copied";
    });
  }
  for (const button of document.querySelectorAll("button[data-search]")) {
    button.addEventListener("click", () => {
      byId("features-search").value = button.dataset.search;
      filter();
      byId("features").scrollIntoView({ behavior: "smooth" });
    });
  }
  if (data.features) {
    tableOfFeatures();
    documentRows();
    byId("feature-close").addEventListener("click", () => byId("feature").close());
    byId("feature-before").addEventListener("click", () => step(-1));
    byId("feature-after").addEventListener("click", () => step(1));
    byId("feature").addEventListener("close", () => history.replaceState(null, "", "#features"));
    for (const button of document.querySelectorAll("button[data-feature]"))
      button.addEventListener("click", () => openFeature(Number(button.dataset.feature)));
    const asked = location.hash.match(/^#feature-(\d+)$/);
    if (asked) openFeature(Number(asked[1]));
  }
  drawAll();
})();
