"use strict";
// Curves, and the samples one by one. Texts become text nodes only, never HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const OWN = { b: "bonus", c: "correction", e: "either", u: "undrafted" };
  const SAYS = {
    accepted: "drafted and accepted",
    correction: "correction by the target",
    bonus: "bonus token of the target",
    either: "the target's own: bonus or correction, the file does not say which",
    undrafted: "the target's own, nothing was offered",
  };
  const DEVICE_COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f"];
  const DEVICE_DASHES = ["", "6 3", "2 3", "8 3 2 3"];

  function element(name, attributes = {}, ...children) {
    const isSvg = ["svg", "path"].includes(name);
    const made = isSvg
      ? document.createElementNS("http://www.w3.org/2000/svg", name)
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  // -- curves ------------------------------------------------------------------------------

  /** At most about five round numbers from `low` to `high`. */
  function ticks(low, high) {
    const rough = (high - low || 1) / 4;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step);
    return found.map((value) => Number(value.toPrecision(12)));
  }

  /** Fills a figure with the chart {title, x, y, most, marks, series: [{label, color, dash, points}]};
   *  `most` is the end of the y axis, `marks` puts a dot on every point. */
  function drawChart(figure, chart) {
    const isKnown = (point) => point.every(Number.isFinite);
    const points = chart.series.flatMap((line) => line.points).filter(isKnown);
    if (!points.length) return figure.replaceChildren();
    const left = Math.min(...points.map((point) => point[0]));
    const right = Math.max(...points.map((point) => point[0]));
    const most = chart.most || Math.max(...points.map((point) => point[1])) * 1.05;
    const atX = (x) => (100 * (x - left)) / (right - left || 1);
    const atY = (y) => (100 * y) / (most || 1);
    const svg = element("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": chart.title });
    const xAxis = element("div", { class: "x" });
    const yAxis = element("div", { class: "y" });
    for (const y of ticks(0, most)) {
      svg.append(element("path", { class: "grid", d: `M0 ${100 - atY(y)}H100` }));
      yAxis.append(element("span", { style: `bottom:${atY(y)}%` }, y.toLocaleString("en")));
    }
    for (const x of ticks(left, right)) {
      xAxis.append(element("span", { style: `left:${atX(x)}%` }, x.toLocaleString("en")));
    }
    const key = element("div", { class: "key" });
    for (const line of chart.series) {
      const look = { stroke: line.color, "stroke-dasharray": line.dash };
      const known = line.points.filter(isKnown);
      const places = known.map(([x, y]) => `${atX(x).toFixed(2)} ${(100 - atY(y)).toFixed(2)}`);
      if (places.length) svg.append(element("path", { ...look, d: `M${places.join("L")}` }));
      if (chart.marks) {
        for (const place of places) svg.append(element("path", { class: "point", stroke: line.color, d: `M${place}h0` }));
      }
      const sign = element("svg", { viewBox: "0 0 30 8" }, element("path", { ...look, "stroke-width": 2, fill: "none", d: "M0 4H30" }));
      key.append(element("div", {}, sign, line.label));
    }
    figure.replaceChildren(
      element("figcaption", {}, chart.title),
      element("div", { class: "axis" }, chart.y),
      element("div", { class: "frame" }, yAxis, svg, xAxis),
      element("div", { class: "axis below" }, chart.x),
      key,
    );
  }

  // -- a sample ----------------------------------------------------------------------------

  /** Characters (code points, as Python counts them) before each token, and after the last. */
  function tokenEnds(sample, numCharacters) {
    const ends = [0];
    for (let token = 0; token < sample.numTokens; token++) {
      const share = (sample.numCharacters * (token + 1)) / sample.numTokens;
      const end = sample.lengths ? ends[token] + (sample.lengths[token] || 0) : Math.round(share);
      ends.push(Math.min(end, numCharacters));
    }
    return ends;
  }

  function tokenSpan(kind, text) {
    const span = element("span", { class: `tok ${kind}` }, text);
    const mark = text === "" ? "\u2205" : text.trim() === "" && text.includes("\n") ? "\u23ce" : "";
    if (mark && kind !== "accepted") {
      span.classList.add("marked");
      span.dataset.mark = mark;
    }
    return span;
  }

  function stepFacts(written, step) {
    const accepted = written.accepted[step];
    const offered = written.offered ? ` of ${written.offered[step]}` : "";
    const own = OWN[written.own[step]];
    const at = written.ends ? `, done at ${written.ends[step].toLocaleString("en")} ms` : "";
    return `${step + 1} of ${written.accepted.length}: ${accepted}${offered} accepted` +
      `${own ? `, then ${SAYS[own]}` : ", then the end"}; forward ${written.ms[step]} ms${at}`;
  }

  /** The text in spans, one a verification; what no verification wrote stays as it is. */
  function writeText(sample) {
    const characters = Array.from(data.texts[sample.text]);
    const ends = tokenEnds(sample, characters.length);
    const slice = (from, to) => characters.slice(ends[Math.min(from, sample.numTokens)], ends[Math.min(to, sample.numTokens)]).join("");
    const box = byId("text");
    box.replaceChildren();
    const written = sample.written;
    if (!written) {
      box.append(characters.join(""));
      return;
    }
    let token = written.before;
    if (token) box.append(element("span", { class: "tok undrafted", title: "written by the prefill" }, slice(0, token)));
    written.accepted.forEach((accepted, step) => {
      if (token >= sample.numTokens) return;
      const span = element("span", { class: "step", "data-step": step, title: stepFacts(written, step) });
      if (accepted) span.append(tokenSpan("accepted", slice(token, token + accepted)));
      token += accepted;
      const own = OWN[written.own[step]];
      if (own && token < sample.numTokens) {
        span.append(tokenSpan(own, slice(token, token + 1)));
        token += 1;
      }
      box.append(span);
    });
    const rest = characters.slice(ends[Math.min(token, sample.numTokens)]).join("");
    if (rest) box.append(element("span", { title: "the file does not say how these were written" }, rest));
  }

  function writeLegend(sample) {
    const written = sample.written;
    const kinds = written ? ["accepted", ...new Set(Array.from(written.own, (sign) => OWN[sign]).filter(Boolean))] : [];
    byId("legend").replaceChildren(
      ...kinds.map((kind) => element("span", {}, element("span", { class: `tok ${kind}` }, kind === "either" ? "own" : kind), ` ${SAYS[kind]}`)),
    );
    const notes = [];
    if (!written) notes.push("Greedy: every token is the target's own, one a forward.");
    else if (!sample.lengths) notes.push("Approximate: the file does not say which characters each token has, so the text is divided evenly among its tokens.");
    if (data.texts[sample.text] && sample.numCharacters > Array.from(data.texts[sample.text]).length) {
      notes.push(`The text is cut; it has ${sample.numCharacters.toLocaleString("en")} characters.`);
    }
    byId("text-note").textContent = notes.join(" ");
  }

  function writeFacts(sample) {
    const facts = [
      `${sample.numTokens.toLocaleString("en")} tokens in ${sample.seconds.toLocaleString("en", { maximumFractionDigits: 3 })} s`,
      `${((1000 * sample.seconds) / (sample.numTokens || 1)).toFixed(2)} ms/token`,
      `${(sample.numTokens / (sample.seconds || 1)).toFixed(1)} tokens/s`,
    ];
    if (sample.firstToken !== null) facts.push(`first token after ${(1000 * sample.firstToken).toFixed(1)} ms`);
    if (sample.written) facts.push(`${sample.written.accepted.length} verifications`);
    if (sample.finish) facts.push(`ended by ${sample.finish}`);
    if (sample.divergence !== null) facts.push(`leaves greedy's text at token ${sample.divergence}, logit margin ${sample.margin}`);
    byId("facts").textContent = facts.join(" \u00b7 ");
  }

  function progressChart(run, sample) {
    const series = [{ label: run.label, color: run.color, dash: "", points: sample.curve }];
    const greedy = run.greedy === null ? null : data.runs[run.greedy];
    const same = greedy && greedy !== run && greedy.samples.find((other) => other.index === sample.index && other.prompt === sample.prompt);
    if (same) series.push({ label: greedy.label, color: greedy.color, dash: "6 3", points: same.curve });
    const note = sample.isEstimated ? " (estimated: the file has no times of verifications)" : "";
    return { title: `Tokens over time${note}`, x: "seconds since the prompt was submitted", y: "tokens", series };
  }

  // A reading tells of the time since the one before it; the first, of before the sample.
  function steps(points) {
    return points.slice(1).flatMap(([at, value], index) => [[points[index][0], value], [at, value]]);
  }

  function utilizationChart(run, sample) {
    const series = run.devices.map((label, device) => ({
      label,
      color: DEVICE_COLORS[device % DEVICE_COLORS.length],
      dash: DEVICE_DASHES[device % DEVICE_DASHES.length],
      points: steps(sample.utilization.map(([at, values]) => [at, values[device] ?? null])),
    }));
    return { title: "Utilization over time", x: "seconds", y: "percent", most: 105, series };
  }

  const filled = data.runs.map((run, index) => index).filter((index) => data.runs[index].samples.length);
  const first = filled.includes(data.start) ? data.start : filled[0];
  let shown = { run: first, place: 0 };

  function chooseStep(step) {
    const { written } = data.runs[shown.run].samples[shown.place];
    byId("text").querySelectorAll(".chosen").forEach((span) => span.classList.remove("chosen"));
    byId("step-facts").textContent = step < 0 ? "" : stepFacts(written, step);
    const span = byId("text").querySelector(`[data-step="${step}"]`);
    if (!span) return;
    span.classList.add("chosen");
    byId("step").value = step;
    const box = byId("text");
    if (span.offsetTop < box.scrollTop + box.offsetTop || span.offsetTop > box.scrollTop + box.offsetTop + box.clientHeight) {
      box.scrollTop = span.offsetTop - box.offsetTop - box.clientHeight / 2;
    }
  }

  function show(run, place) {
    shown = { run, place };
    const { samples } = data.runs[run];
    const sample = samples[place];
    byId("run").value = run;
    byId("sample").replaceChildren(...samples.map((other, index) => element("option", { value: index }, String(other.index))));
    byId("sample").value = place;
    byId("previous").disabled = place === 0;
    byId("next").disabled = place === samples.length - 1;
    byId("prompt").textContent = data.texts[sample.prompt];
    writeFacts(sample);
    writeLegend(sample);
    writeText(sample);
    byId("stepper").hidden = !sample.written;
    if (sample.written) {
      byId("step").max = sample.written.accepted.length - 1;
      chooseStep(0);
    }
    drawChart(byId("progress"), progressChart(data.runs[run], sample));
    byId("utilization").hidden = sample.utilization.length < 2;
    if (sample.utilization.length >= 2) drawChart(byId("utilization"), utilizationChart(data.runs[run], sample));
  }

  /** Shows what the reader chose, and puts it into the address: #run=1&sample=2. */
  function choose(run, place) {
    show(run, place);
    const { index } = data.runs[run].samples[place];
    history.replaceState(null, "", `#run=${run + 1}&sample=${index}`);
  }

  /** What the address names: the run by its place, the sample by its index in the file. */
  function showAddress() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    let run = Number(wanted.get("run")) - 1;
    if (!data.runs[run]?.samples.length) run = first;
    const index = Number(wanted.get("sample") ?? NaN);
    show(run, Math.max(0, data.runs[run].samples.findIndex((sample) => sample.index === index)));
    if (wanted.has("run")) byId("samples").scrollIntoView();
  }

  document.querySelectorAll(".chart > script").forEach((script) => drawChart(script.parentElement, JSON.parse(script.textContent)));
  byId("run").append(
    ...filled.map((index) => element("option", { value: index }, `${index + 1}. ${data.runs[index].label}`)),
  );
  byId("run").addEventListener("change", (event) => {
    const run = Number(event.target.value);
    const { index } = data.runs[shown.run].samples[shown.place];
    choose(run, Math.max(0, data.runs[run].samples.findIndex((sample) => sample.index === index)));
  });
  byId("sample").addEventListener("change", (event) => choose(shown.run, Number(event.target.value)));
  byId("previous").addEventListener("click", () => choose(shown.run, shown.place - 1));
  byId("next").addEventListener("click", () => choose(shown.run, shown.place + 1));
  byId("step").addEventListener("input", (event) => chooseStep(Number(event.target.value)));
  byId("text").addEventListener("click", (event) => {
    const span = event.target.closest(".step");
    if (span) chooseStep(Number(span.dataset.step));
  });
  window.addEventListener("hashchange", showAddress);
  if (filled.length) showAddress();
  else byId("samples").hidden = true;
  document.documentElement.dataset.ready = "yes";
})();
