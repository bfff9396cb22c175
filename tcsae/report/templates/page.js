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
    if (array.dtype === "float24") {  // float32 without its lowest byte
      const wide = new Uint8Array(text.length / 3 * 4);
      for (let i = 0, to = 1; i < text.length; to++)
        for (const end = i + 3; i < end; i++) wide[to++] = text.charCodeAt(i);
      return new Float32Array(wide.buffer);
    }
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return new kinds[array.dtype](bytes.buffer);
  }

  /** What a packed array holds, unpacked when it is first asked for. */
  const held = (array) => array.held ??= unpacked(array);

  /** Where the entries of each begin, of how many each has. */
  function starts(counts) {
    const start = new Int32Array(counts.length + 1);
    for (let i = 0; i < counts.length; i++) start[i + 1] = start[i] + counts[i];
    return start;
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
    if (!hovers) result.dragmode = false;  // a finger that moves scrolls the page
    result.modebar = { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: text };
    result.hoverlabel = { bgcolor: colour("--panel"), bordercolor: line, font: { color: text } };
    return result;
  }

  const hovers = window.matchMedia("(hover: hover)").matches;
  const options = {
    responsive: true, displaylogo: false,
    // Without a pointer that hovers the buttons would always cover the figure.
    displayModeBar: hovers ? "hover" : false,
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

  // ---------------------------------------------------------------- the features

  /** Of one feature, what every feature has: these come with the page. A feature is its number. */
  const all = data.features;

  function valueOf(key, feature) {
    const value = held(all.values[key])[feature];
    return Number.isNaN(value) ? null : value;
  }

  function tokensOf(feature) {
    const { count, at, vocabulary } = all.tokens;
    all.tokens.start ??= starts(held(count));
    const { start } = all.tokens;
    return Array.from(held(at).subarray(start[feature], start[feature + 1]), (i) => vocabulary[i]);
  }

  const isLive = (feature) => held(all.live)[feature] > 0;

  function clusterName(feature) {
    const cluster = held(all.cluster)[feature];
    return cluster < 0 ? "" : `cluster ${cluster} · ${all.cluster_names[cluster] ?? ""}`;
  }

  // The rest comes in parts: one part with a small page, else scripts in a folder beside it, which
  // a page that is opened as a file may load.

  const KEPT = 24;  // parts
  const parts = new Map(), coming = new Map();
  window.tcsaeFeatures = (name, content) => parts.set(name, content);

  const partName = (feature) => String(Math.floor(feature / all.part_size)).padStart(4, "0");

  /** The part of a feature; undefined: it is not there yet. */
  const partOf = (feature) => all.part ?? parts.get(partName(feature));

  /** A file of the folder, or an error that says what is wrong. */
  function loaded(name) {
    if (parts.has(name)) return Promise.resolve(parts.get(name));
    if (!coming.has(name)) {
      coming.set(name, new Promise((resolve, reject) => {
        const script = element("script", { src: `${all.folder}/${name}.js` });
        const ended = () => {
          script.remove();
          coming.delete(name);
          if (parts.has(name)) resolve(parts.get(name));
          else reject(new Error(`${all.folder}/${name}.js is not beside this page, or damaged: ` +
            "the folder belongs to the page and is copied with it"));
        };
        script.addEventListener("load", ended);
        script.addEventListener("error", ended);
        document.head.append(script);
      }));
    }
    return coming.get(name);
  }

  async function loadedPart(feature) {
    const part = await loaded(partName(feature));
    const names = [...parts.keys()].filter((name) => name !== WORDS);
    for (const name of names.slice(0, -KEPT)) parts.delete(name);
    return part;
  }

  // ---------------------------------------------------------------- the table of features

  const CHUNK = 100;
  let order = [], shown = 0, sortKey = null, descending = true;

  function tableOfFeatures() {
    const head = byId("features-head");
    for (const column of all.columns) {
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
    sortBy(all.first_sort);
  }

  const column = (key) => all.columns.find((c) => c.key === key);

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

  function sortValue(feature) {
    if (sortKey === "id") return feature;
    if (sortKey === "cluster") {
      const cluster = held(all.cluster)[feature];
      return cluster < 0 ? null : cluster;
    }
    if (sortKey === "tokens") return tokensOf(feature)[0]?.trim().toLowerCase() || null;
    return valueOf(sortKey, feature);
  }

  // ---------------------------------------------------------------- the search

  const CONDITION = /([^\s<>=]+)\s*(<=|>=|<|>|=)\s*(-?\d*\.?\d+(?:e[+-]?\d+)?)(?=\s|$)/gi;
  const holds = {
    "<": (x, y) => x < y, ">": (x, y) => x > y, "=": (x, y) => Number(x.toPrecision(4)) === y,
    "<=": (x, y) => x <= y, ">=": (x, y) => x >= y,
  };
  const plainName = (text) => text.toLowerCase().replaceAll("²", "2").replace(/[^a-z0-9]/g, "");

  /** The key of the column that a condition names: its key or heading, or C, L, D for a window's. */
  function columnNamed(name) {
    const keys = all.columns.filter((c) => !c.text || c.key === "id");
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

  function meets(feature, { key, holds, value }) {
    const own = key === "id" ? feature : valueOf(key, feature);
    return own !== null && holds(own, value);
  }

  let haystacks = [];

  /** What the page itself says of a feature in words. */
  const haystack = (feature) => haystacks[feature] ??=
    [feature, clusterName(feature), ...tokensOf(feature)].join(" ").toLowerCase();

  const WORDS = "words";
  let around = null;  // feature -> the text around its peaks, when it was first asked for
  let unread = "";  // why there is none

  /** Whether a search looks into the contexts: not for a number, nor for a single letter. */
  const isWord = (wanted) => !/^\d*$/.test(wanted) && (wanted.length > 1 || wanted > "\u02ff");

  /** The text around the peaks of every feature that has contexts; a promise while it is read. */
  function textAround() {
    if (around) return around;
    if (all.part) around = all.part.top ? ofTheContexts(all.part) : new Map();
    else if (!all.has_words) around = new Map();
    else return loaded(WORDS).then((words) => {
      parts.delete(WORDS);
      return around ??= ofTheWords(words);
    });
    return around;
  }

  /** Whether a text has the words asked for: in scripts that part words, from a word's beginning. */
  function hasWords(wanted) {
    if (!/^[a-z]/.test(wanted)) return (text) => text.includes(wanted);
    const literal = wanted.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    const pattern = new RegExp(`(?<![\\p{L}\\p{N}])${literal}`, "u");
    return (text) => text.includes(wanted) && pattern.test(text);
  }

  /** Texts as they are searched: white space is a space, and none runs on into the next. */
  const folded = (texts) =>
    texts.map((text) => text.replace(/\s+/g, " ")).join("\n").toLowerCase();

  function ofTheWords({ features, vocabulary, ids }) {
    const numbers = held(ids), [, k, length] = ids.shape;
    const text = (start) =>
      Array.from(numbers.subarray(start, start + length), (i) => vocabulary[i]).join("");
    return new Map(Array.from(held(features), (feature, row) => [feature,
      folded(Array.from({ length: k }, (_, n) => text((row * k + n) * length)))]));
  }

  function ofTheContexts(part) {
    const top = topContexts(part), k = top.context.shape[1], found = new Map();
    part.top.row.forEach((own, i) => {
      const entries = own < 0 ? [] : Array.from({ length: k }, (_, n) => own * k + n);
      const texts = entries.filter((entry) => held(top.context)[entry] >= 0).map((entry) => {
        const [from, to] = nearPeak(top, entry);
        return piecesOf(top, held(top.context)[entry], from, to).map(({ text }) => text).join("");
      });
      found.set(part.first + i, folded(texts));
    });
    return found;
  }

  function filter() {
    const typed = byId("features-search").value;
    const { conditions, unknown, wanted } = asked(typed);
    const numbers = Array.from({ length: all.n }, (_, feature) => feature)
      .filter((feature) => conditions.every((condition) => meets(feature, condition)));
    const said = unknown.map((name) => `there is no column ${name}`);
    const texts = wanted && isWord(wanted) ? textAround() : new Map();
    if (texts instanceof Promise) {
      said.push("reading the words of the contexts ...");
      texts.catch((error) => { [around, unread] = [new Map(), error.message]; })
        .then(() => { if (byId("features-search").value === typed) filter(); });
    } else if (unread && isWord(wanted)) {
      said.push(unread);
    }
    const named = (feature) => !wanted || haystack(feature).includes(wanted);
    order = inOrder(numbers.filter(named));
    if (texts instanceof Map && texts.size) {
      const has = hasWords(wanted);
      const near = numbers.filter((feature) => texts.has(feature) && !named(feature) &&
        has(texts.get(feature)));
      if (near.length) said.push(`${near.length.toLocaleString("en")} of them by their contexts`);
      order.push(...inOrder(near));
    }
    byId("features-count").textContent = [`${order.length.toLocaleString("en")} of ` +
      `${all.n.toLocaleString("en")} features`, ...said].join("; ");
    byId("features-body").replaceChildren();
    byId("features-rows").scrollTop = 0;
    shown = 0;
    moreRows();
  }

  /** Features sorted by the column chosen; those without a value last. */
  function inOrder(features) {
    const sign = descending ? -1 : 1;
    const keyed = features.map((feature) => ({ feature, key: sortValue(feature) }));
    keyed.sort((a, b) => {
      if (a.key === null || b.key === null)
        return (a.key === null) - (b.key === null) || a.feature - b.feature;
      return sign * (a.key < b.key ? -1 : a.key > b.key ? 1 : 0) || a.feature - b.feature;
    });
    return keyed.map(({ feature }) => feature);
  }

  function moreRows() {
    const rows = order.slice(shown, shown + CHUNK).map(tableRow);
    shown += rows.length;
    byId("features-body").append(...rows);
  }

  function tokenList(tokens) {
    return tokens.map((text) => element("span", { className: "token" }, visible(text)));
  }

  /** Text of a token with its white space shown. */
  const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·");

  function tableRow(feature) {
    const line = element("tr");
    line.dataset.feature = feature;
    if (!isLive(feature)) line.className = "dead";
    for (const { key } of all.columns) {
      if (key === "id") {
        line.append(element("td", {}, element("button",
          { className: "link", type: "button" }, String(feature))));
      } else if (key === "tokens") {
        line.append(element("td", { className: "text tokens" }, ...tokenList(tokensOf(feature))));
      } else if (key === "cluster") {
        line.append(element("td", { className: "text tokens" }, clusterName(feature)));
      } else {
        line.append(element("td", {}, number(valueOf(key, feature))));
      }
    }
    return line;
  }

  // ---------------------------------------------------------------- one feature

  let current = null;

  function openFeature(feature) {
    if (!(feature < all.n)) return;
    current = feature;
    const dialog = byId("feature");
    byId("feature-title").textContent = `Feature ${feature}` +
      (isLive(feature) ? "" : " (never fired)");
    byId("feature-cluster").textContent = clusterName(feature);
    byId("feature-tokens").replaceChildren(...tokenList(tokensOf(feature)));
    byId("feature-facts").replaceChildren(...all.columns
      .filter(({ key }) => key in all.values)
      .map(({ key, name, meaning }) => element("div", { title: meaning },
        element("span", {}, name), element("span", {}, number(valueOf(key, feature))))));
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    history.replaceState(null, "", `#feature-${feature}`);
    const part = partOf(feature);
    if (part) fillFeature(part, feature);
    else waitForFeature(feature);
  }

  /** What its part has of a feature. */
  function fillFeature(part, feature) {
    byId("feature").classList.remove("waiting");
    byId("feature-lens").replaceChildren(...logitLens(part, feature));
    byId("feature-partners").replaceChildren(...partners(part, feature));
    byId("feature-contexts").replaceChildren(...contexts(part, feature));
    byId("feature-document").replaceChildren(...alongDocument(part, feature));
    drawFeature(part, feature);
  }

  function waitForFeature(feature) {
    byId("feature").classList.add("waiting");
    for (const name of ["lens", "partners", "document"]) byId(`feature-${name}`).replaceChildren();
    const say = (text, className) =>
      byId("feature-contexts").replaceChildren(element("p", { className }, text));
    say("reading ...", "");
    loadedPart(feature).then((part) => { if (feature === current) fillFeature(part, feature); },
      (error) => { if (feature === current) say(error.message, "missing"); });
  }

  function step(by) {
    const at = order.indexOf(current) + by;
    if (at >= 0 && at < order.length) openFeature(order[at]);
  }

  function drawFeature(part, feature) {
    const { rho: coded, rate: levels, rate_scale: scales } = part.curves;
    const own = feature - part.first;
    const slice = (curve, scale) => {
      const n = curve.shape[1];
      return Array.from(held(curve).subarray(own * n, (own + 1) * n), (v) =>
        v === curve.missing ? null : v * scale);
    };
    const axis = (title) => ({ title: { text: title } });
    const margin = { l: 55, r: 10, t: 10, b: 45 };
    const clear = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
    const rho = slice(coded, 1 / 10000);
    draw(byId("feature-rho"), {
      data: [{ x: rho.map((_, k) => k).slice(1), y: rho.slice(1), mode: "lines+markers",
        line: { color: "#0072B2" }, marker: { size: 4 }, hovertemplate: "lag %{x}: %{y:.3f}<extra></extra>" }],
      layout: { height: 220, margin, ...clear, xaxis: axis("lag, tokens"),
        yaxis: { ...axis("rho"), zeroline: true } },
    });
    const rate = slice(levels, scales[own] / 255);
    draw(byId("feature-profile"), {
      data: [{ x: all.positions, y: rate, mode: "lines", fill: "tozeroy",
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

  function logitLens(part, feature) {
    const { lens } = part;
    const at = lens ? lens.row[feature - part.first] : -1;
    if (at < 0) return [];
    return [["raised", "Raises"], ["lowered", "Lowers"]].map(([name, said]) => {
      const k = lens[name].shape[1];
      const of = Array.from(held(lens[name]).subarray(at * k, (at + 1) * k));
      return element("p", { title: "logits of the next token, by the feature's direction alone" },
        `${said}: `, ...tokenList(of.map((i) => lens.vocabulary[i])));
    });
  }

  function partners(part, feature) {
    const lines = [], own = feature - part.first;
    const said = (other) => [featureLink(other), " ", ...tokenList(tokensOf(other))];
    const nearest = held(part.nearest)[own];
    if (nearest >= 0) {
      lines.push(element("p", {}, "Nearest direction: feature ", ...said(nearest),
        ` (decoder cosine ${number(held(part.cosine)[own])})`));
    }
    for (const [other, r] of part.together[own]) {
      lines.push(element("p", {}, "Fires with: feature ", ...said(other), ` (correlation ${number(r)})`));
    }
    for (const kind of part.pairs) {
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

  function topContexts(part) {
    const { top } = part;
    if (top && !top.start) {
      top.start = starts(held(top.count));
      top.whole = new Map();  // context -> place -> the piece of several tokens that holds it
      for (const [context, from, to, text] of top.joined) {
        if (!top.whole.has(context)) top.whole.set(context, new Map());
        for (let i = from; i < to; i++) top.whole.get(context).set(i, { from, to, text });
      }
    }
    return top;
  }

  /** From where to where a context is shown at first. */
  function nearPeak(top, entry) {
    const peak = held(top.position)[entry];
    return [Math.max(0, peak - all.around), Math.min(top.ids.shape[1], peak + all.around + 1)];
  }

  /** The pieces of a context from one place to another, whole characters each: {from, to, text}. */
  function piecesOf(top, context, from, to) {
    const found = [], whole = top.whole.get(context), start = context * top.ids.shape[1];
    let at = whole?.get(from)?.from ?? from;
    while (at < to) {
      const piece = whole?.get(at) ??
        { from: at, to: at + 1, text: top.vocabulary[held(top.ids)[start + at]] };
      found.push(piece);
      at = piece.to;
    }
    return found;
  }

  function contexts(part, feature) {
    const top = topContexts(part);
    const own = top ? top.row[feature - part.first] : -1;
    if (own < 0) return [element("p", { className: "missing" }, all.top_reason)];
    const k = top.context.shape[1], found = [];
    for (let i = own * k; i < (own + 1) * k; i++)
      if (held(top.context)[i] >= 0) found.push(contextBlock(top, i));
    return found.length ? found : [element("p", {}, "It never fired on held-out text.")];
  }

  function contextBlock(top, entry) {
    const length = top.ids.shape[1], context = held(top.context)[entry];
    const peak = held(top.position)[entry], value = held(top.value)[entry];
    const k = top.context.shape[1], largest = held(top.value)[entry - entry % k];
    const level = new Float32Array(length);
    for (let i = top.start[entry]; i < top.start[entry + 1]; i++)
      level[held(top.at)[i]] = held(top.level)[i] / 255;
    const text = element("div", { className: "context-text", dir: "auto" });
    const fill = (from, to) => {
      const spans = piecesOf(top, context, from, to).map((piece) =>
        pieceSpan(top, context, piece, level, largest, peak));
      text.replaceChildren(...(from > 0 ? ["… "] : []), ...spans, ...(to < length ? [" …"] : []));
    };
    fill(...nearPeak(top, entry));
    const button = element("button", { className: "link", type: "button" }, "whole context");
    let whole = false;
    button.addEventListener("click", () => {
      whole = !whole;
      button.textContent = whole ? "around the peak" : "whole context";
      if (whole) fill(0, length); else fill(...nearPeak(top, entry));
    });
    const head = element("div", { className: "context-head" },
      `peak ${number(value)} at position ${peak}, held-out context ${top.numbers[context]} `, button);
    return element("div", { className: "context" }, head, text);
  }

  /** Tokens that make whole characters together, as a rule one: marked by its largest activation. */
  function pieceSpan(top, context, { from, to, text }, level, largest, peak) {
    const start = context * top.ids.shape[1];
    const places = Array.from({ length: to - from }, (_, i) => from + i);
    if (!places.some((at) => held(top.valid)[start + at])) return element("span",
      { className: "masked", title: "left out of every metric" }, text.replaceAll("\n", "⏎"));
    const strongest = Math.max(...places.map((at) => level[at]));
    if (!strongest) return document.createTextNode(text.replaceAll("\n", "⏎\n"));
    const alone = (at) =>
      places.length === 1 ? "" : `${top.vocabulary[held(top.ids)[start + at]]} `;
    const title = places.map((at) =>
      `${alone(at)}${number(level[at] * largest)} at position ${at}`).join("; ");
    const mark = element("mark", { title }, text.replaceAll("\n", "⏎\n"));
    mark.style.setProperty("--level", (0.12 + 0.78 * strongest).toFixed(2));
    mark.classList.toggle("strong", strongest > 0.7);
    mark.classList.toggle("peak", places.includes(peak));
    return mark;
  }

  // ---------------------------------------------------------------- along one document

  /** Activation at each place, 0 to 1, of a row of `marks`. */
  function documentLevels(marks, row) {
    marks.start ??= starts(held(marks.count));
    const level = new Float32Array(held(data.document.valid).length);
    for (let i = marks.start[row]; i < marks.start[row + 1]; i++)
      level[held(marks.at)[i]] = held(marks.level)[i] / 255;
    return level;
  }

  function documentText(marks, row) {
    const passage = data.document, level = documentLevels(marks, row), spans = [];
    let from = 0;
    passage.texts.forEach((text, i) => {
      const stop = held(passage.stops)[i];
      let strongest = 0, counts = false;
      for (let at = from; at < stop; at++) {
        strongest = Math.max(strongest, level[at]);
        counts ||= Boolean(held(passage.valid)[at]);
      }
      const shown = text.replaceAll("\n", "⏎\n");
      if (!counts) spans.push(element("span", { className: "masked" }, shown));
      else if (!strongest) spans.push(shown);
      else {
        const mark = element("mark",
          { title: `${number(strongest * marks.peak[row])} at place ${from}` }, shown);
        mark.style.setProperty("--level", (0.12 + 0.78 * strongest).toFixed(2));
        mark.classList.toggle("strong", strongest > 0.7);
        spans.push(mark);
      }
      from = stop;
    });
    return spans;
  }

  /** A row of cells, a pixel a token, stretched to the width of its place. */
  function documentCells(marks, row) {
    const level = documentLevels(marks, row);
    const canvas = element("canvas", { className: "cells", width: level.length, height: 1 });
    const pen = canvas.getContext("2d");
    level.forEach((value, at) => {
      if (!held(data.document.valid)[at]) pen.fillStyle = "rgba(128,128,128,.35)";
      else if (value) pen.fillStyle = `rgba(230,159,0,${(0.2 + 0.8 * value).toFixed(2)})`;
      else return;
      pen.fillRect(at, 0, 1, 1);
    });
    return canvas;
  }

  /** The text marked by a feature, in a box that shows the first place where it is strong. */
  function fillDocument(box, marks, row) {
    box.replaceChildren(...documentText(marks, row));
    const first = box.querySelector("mark.strong") ?? box.querySelector("mark");
    box.scrollTop = first ? Math.max(0, first.offsetTop - box.offsetTop - 60) : 0;
  }

  function alongDocument(part, feature) {
    const marks = part.document, row = feature - part.first;
    if (!marks) return [element("p", { className: "missing" }, "There is none in this run's analysis.")];
    const n = held(marks.count)[row];
    if (!n) return [element("p", {}, "It does not fire there.")];
    const box = element("div", { className: "context-text document-text", dir: "auto", tabIndex: 0 });
    setTimeout(() => fillDocument(box, marks, row));  // when it has its place
    return [element("div", { className: "context-head" },
      `on at ${number(n)} tokens, peak ${number(marks.peak[row])}`),
      documentCells(marks, row), box];
  }

  function documentRows() {
    const rows = [...document.querySelectorAll("#document-rows [data-row]")];
    if (!data.document || !rows.length) return;
    const { raster, own } = data.document;
    const choose = (line) => {
      const feature = Number(line.dataset.row);
      for (const other of rows) other.classList.toggle("chosen", other === line);
      byId("document-said").textContent = `The text, marked where feature ${feature} is on:`;
      fillDocument(byId("document-text"), own, raster.indexOf(feature));
    };
    for (const line of rows) line.addEventListener("click", () => choose(line));
    choose(rows[0]);
  }

  // ---------------------------------------------------------------- touch

  /** What a title tells a pointer that rests on it, a tap tells in a box; the next tap closes it. */
  function tapped() {
    const box = element("div", { className: "told", role: "status" });
    let kind = "mouse";
    window.addEventListener("pointerdown", (event) => { kind = event.pointerType; }, true);
    window.addEventListener("pointercancel", () => box.remove());  // a swipe: the text goes away
    const tap = (event) => {
      box.remove();
      const told = event.target.closest("[title], svg.cells");
      if (kind === "mouse" || !told || told.closest("button, a")) return;
      box.textContent = told.title || told.ariaLabel;
      // An open dialog hides what is not in it.
      (told.closest("dialog") ?? document.body).append(box);
      const { width, height } = box.getBoundingClientRect(), gap = 14;
      const right = document.documentElement.clientWidth - width - gap;
      box.style.left = `${Math.max(gap, Math.min(event.clientX - width / 2, right))}px`;
      const above = event.clientY - height - gap;  // where no finger is
      box.style.top = `${above < gap ? event.clientY + 2 * gap : above}px`;
    };
    // Not of the document: Safari makes a click of a tap only within an element that listens.
    for (const part of document.querySelectorAll("body > *")) part.addEventListener("click", tap);
  }

  // ---------------------------------------------------------------- start

  tapped();
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
    byId("feature").addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") step(-1);
      else if (event.key === "ArrowRight") step(1);
    });
    const openLinked = () => {
      const linked = location.hash.match(/^#feature-(\d+)$/);
      if (linked) openFeature(Number(linked[1]));
    };
    window.addEventListener("hashchange", openLinked);
    openLinked();
  }
  drawAll();
})();
