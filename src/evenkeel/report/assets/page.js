"use strict";
// Draws the figures from their specifications, and makes tables sortable and commands copyable.
// Without this script the page is whole but for the figures, whose numbers are in the tables.
(() => {
  const NARROW = 560;
  const SHARES = [0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999];
  const NEXT = { none: "ascending", ascending: "descending", descending: "none" };
  const root = document.documentElement;
  const said = document.getElementById("said");

  // Colours: "@c1" is the style sheet's --c1, "@c1/20" the same at 20 % opacity.
  function colour(text, style) {
    const found = /^@([a-z]+[0-9]*)(?:\/([0-9]+))?$/.exec(text);
    if (!found) return text;
    const value = style.getPropertyValue("--" + found[1]).trim();
    if (!found[2]) return value;
    const [r, g, b] = [1, 3, 5].map((place) => parseInt(value.slice(place, place + 2), 16));
    return `rgba(${r}, ${g}, ${b}, ${Number(found[2]) / 100})`;
  }

  function paint(value, style, key = "") {
    if (typeof value === "string") return /color$/.test(key) ? colour(value, style) : value;
    if (Array.isArray(value)) return value.map((each) => paint(each, style, key));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, paint(v, style, k)]));
  }

  function merge(into, more) {
    for (const [key, value] of Object.entries(more)) {
      const deep = value !== null && typeof value === "object" && !Array.isArray(value);
      if (deep) merge((into[key] ??= {}), value);
      else into[key] = value;
    }
  }

  // Names of arms above their rows, where there is little room beside them.
  function lift(layout, rise) {
    const { tickvals, ticktext } = layout.yaxis;
    layout.annotations = tickvals.map((place, n) => ({
      text: ticktext[n],
      x: 0, xref: "paper", xanchor: "left",
      y: place - rise, yref: "y", yanchor: "bottom",
      showarrow: false,
    }));
    Object.assign(layout.yaxis, { showticklabels: false, automargin: false });
    layout.yaxis.range[1] -= rise;
  }

  function stretch(spec, layout, data, width) {
    const { axis, floor } = spec.stretch;
    const up = (share) => (share === null ? null : -Math.log10(Math.max(1 - share, floor)));
    const seen = [];
    for (const trace of data) {
      trace[axis] = trace[axis].map(up);
      if (trace.visible !== "legendonly") seen.push(...trace[axis].filter((v) => v !== null));
    }
    const [low, high] = [Math.min(...seen), Math.max(...seen)];
    const pad = (high - low) * 0.05 || 0.1;
    const inside = (share) => up(share) >= low - pad && up(share) <= high + pad;
    const shares = SHARES.filter((share) => 1 - share > floor && inside(share));
    if (high >= up(1) - 1e-9) shares.push(1);
    const room = ((high - low + 2 * pad) / width) * (axis === "x" ? 40 : 20);
    for (let n = shares.length - 2; n >= 0; n -= 1) {
      if (up(shares[n + 1]) - up(shares[n]) < room) shares.splice(n, 1);
    }
    Object.assign(layout[axis + "axis"], {
      tickmode: "array",
      tickangle: 0,
      tickvals: shares.map(up),
      ticktext: shares.map((share) => Number((100 * share).toFixed(3)) + "%"),
      range: [low - pad, high + pad],
    });
  }

  // The two panels of bands, as picked.
  function choose(spec, layout, data, chosen) {
    layout.margin.t = 28;
    layout.annotations = chosen.map((place, side) => ({
      text: `<b>${spec.choices[place].title}</b>`,
      xref: `x${side + 1} domain`.replace("1", ""),
      yref: `y${side + 1} domain`.replace("1", ""),
      x: 0, y: 1, xanchor: "left", yanchor: "bottom", showarrow: false,
    }));
    chosen.forEach((place, side) => {
      const choice = spec.choices[place];
      ["low", "high", "middle"].forEach((key, n) => {
        Object.assign(data[3 * side + n], { x: choice.x, y: choice[key] });
      });
    });
  }

  function start(plot) {
    const spec = JSON.parse(document.getElementById(plot.dataset.spec).textContent);
    const figure = plot.closest(".figure");
    const state = {
      hidden: new Set(spec.data.filter((t) => t.visible === "legendonly").map((t) => t.meta)),
      stretch: spec.stretch?.on,
      log: spec.log?.on,
      chosen: spec.chosen,
    };

    function draw() {
      const width = plot.clientWidth;
      if (!width) return;
      const narrow = width < NARROW;
      const { data, layout } = structuredClone({ data: spec.data, layout: spec.layout });
      if (narrow) {
        merge(layout, spec.narrow ?? {});
        layout.font.size = 11;
        if (spec.lift) lift(layout, spec.lift);
      }
      for (const trace of data) {
        if ("meta" in trace) trace.visible = state.hidden.has(trace.meta) ? "legendonly" : true;
      }
      const steps = data.filter((t) => typeof t.meta === "number" && t.visible === true);
      if (steps.length) {
        const target = data.find((t) => t.meta === "target");
        const all = steps.flatMap((t) => [t.x[0], t.x[t.x.length - 1]]);
        target.x = [Math.min(...all), Math.max(...all)];
      }
      if (state.chosen) choose(spec, layout, data, state.chosen);
      if (state.stretch) stretch(spec, layout, data, spec.stretch.axis === "x" ? width : plot.clientHeight);
      if (state.log) layout.xaxis.type = "log";
      layout.width = width;
      layout.height = plot.clientHeight;
      const style = getComputedStyle(root);
      Plotly.react(plot, paint(data, style), paint(layout, style), {
        displayModeBar: false,
        doubleClick: false,
        showTips: false,
      });
    }

    figure.addEventListener("change", ({ target }) => {
      const { show, switch: name, side } = target.dataset;
      if (show !== undefined) state.hidden[target.checked ? "delete" : "add"](Number(show));
      else if (name !== undefined) state[name] = target.checked;
      else if (side !== undefined) state.chosen[Number(side)] = Number(target.value);
      else return;
      draw();
    });
    let before = plot.clientWidth;
    new ResizeObserver(() => {
      if (plot.clientWidth === before) return;
      before = plot.clientWidth;
      draw();
    }).observe(plot);
    draw();
    return draw;
  }

  function makeSortable(table) {
    const body = table.tBodies[0];
    const headings = [...table.tHead.rows[0].cells];
    const original = [...body.rows];
    const value = (row, column) => {
      const cell = row.cells[column];
      return "sort" in cell.dataset ? Number(cell.dataset.sort) : cell.textContent.trim();
    };
    const numeric = (column) => original.some((row) => "sort" in row.cells[column].dataset);
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...heading.childNodes);
      heading.append(button);
      heading.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const next = NEXT[heading.getAttribute("aria-sort")];
        const sign = next === "ascending" ? 1 : -1;
        const byNumber = numeric(column);
        const known = (row) => !byNumber || typeof value(row, column) === "number";
        const order = (a, b) => {
          if (known(a) !== known(b)) return known(a) ? -1 : 1; // what is not known goes last
          if (!known(a)) return 0;
          const [x, y] = [value(a, column), value(b, column)];
          return sign * (byNumber ? x - y : x.localeCompare(y));
        };
        body.append(...(next === "none" ? original : [...original].sort(order)));
        for (const each of headings) each.setAttribute("aria-sort", "none");
        heading.setAttribute("aria-sort", next);
      });
    });
  }

  function makeCopyable(code) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.setAttribute("aria-label", "Copy the command " + code.textContent);
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        said.textContent = "Copied";
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; said.textContent = ""; }, 1500);
      } catch {
        getSelection().selectAllChildren(code);
        said.textContent = "Selected; copy it with the keyboard";
      }
    });
    code.after(button);
  }

  for (const table of document.querySelectorAll("table.sortable")) makeSortable(table);
  for (const code of document.querySelectorAll("code.command")) makeCopyable(code);
  const draws = [...document.querySelectorAll(".plot")].map(start);
  document.getElementById("not-drawn").remove();
  const redraw = () => draws.forEach((draw) => draw());
  for (const query of ["(prefers-color-scheme: dark)", "print"]) {
    matchMedia(query).addEventListener("change", redraw);
  }
})();
