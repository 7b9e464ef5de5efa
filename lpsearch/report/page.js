"use strict";
(() => {
  let data = JSON.parse(document.getElementById("data").textContent);
  let plans = [];
  let charts = [];
  const config = {
    displaylogo: false, responsive: true, scrollZoom: false, doubleClick: false, doubleClickDelay: 1,
    modeBarButtons: [["toImage"]], toImageButtonOptions: { scale: 2 },
  };
  let chosen = 0;
  let chosenTrial; // kept, since a page that is served live has other plans in its elements before it says so
  let isPicked = true; // the chosen plan is the page's own pick, not the reader's
  const collect = () => {
    plans = [...document.querySelectorAll("[data-plan]")];
    charts = [...document.querySelectorAll("[data-chart]")].map((element) => ({
      element, name: element.dataset.chart, plot: element.querySelector(".plot"),
    }));
    document.querySelectorAll("button[hidden], .controls[hidden]").forEach((element) => { element.hidden = false; });
  };

  // ---- Colours: figures carry the light ones, and every one of these has a dark one ----
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const recolour = (value) => {
    if (typeof value === "string") return data.colours[value] ?? value;
    if (Array.isArray(value)) return value.map(recolour);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, recolour(item)]));
    }
    return value;
  };

  // ---- Figures ----
  const resolve = (value) => {
    if (Array.isArray(value)) return value.map(resolve);
    if (!value || typeof value !== "object") return value;
    if ("list" in value) return data.lists[value.list].slice();
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item)]));
  };
  const getKey = (chart) => [...chart.element.querySelectorAll("[data-choice]")].map((select) => select.value).join(" ");
  const draw = (chart) => {
    const key = getKey(chart);
    let figure = resolve(data.figures[chart.name][key]);
    if (isDark()) figure = recolour(figure);
    if (chart.name === "layers") {
      chart.plot.style.minWidth = `${figure.data[0].x.length * 9 + 80}px`;
    }
    figure.layout.uirevision = key; // newer data leave what the reader did to the figure
    if (chart.name === "front" && document.getElementById("all-losses").checked) {
      figure.layout.yaxis.autorange = true;
      delete figure.layout.yaxis.range;
    }
    if (chart.plot.clientWidth < 480) narrow(figure, chart.plot.clientWidth);
    const done = Plotly.react(chart.plot, figure.data, figure.layout, config);
    done.then(() => {
      chart.plot.dataset.drawn = key;
      if (chart.name === "front") ring();
    });
  };
  const narrow = (figure, width) => {
    figure.layout.font.size = 11;
    figure.layout.margin.l = 44;
    figure.layout.margin.r = 6;
    if (figure.layout.yaxis.scaleanchor) figure.layout.height = width + 120;
  };
  const redraw = () => {
    charts.forEach(draw);
    theme.textContent = isDark() ? "Light" : "Dark";
    theme.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  };

  // ---- The chosen plan ----
  const frontPlot = document.getElementById("chart-front");
  const ring = () => {
    const front = frontPlot.data.findIndex((trace) => trace.name === "front");
    const place = [...frontPlot.data[front].customdata].indexOf(chosen);
    const { x, y } = frontPlot.data[front];
    const at = place < 0 ? [[], []] : [[x[place]], [y[place]]];
    Plotly.restyle(frontPlot, { x: [at[0]], y: [at[1]] }, [frontPlot.data.length - 1]);
  };
  const choose = (index, move = false) => {
    chosen = Math.min(Math.max(index, 0), plans.length - 1);
    chosenTrial = plans[chosen]?.dataset.trial;
    plans.forEach((plan, place) => { plan.hidden = place !== chosen; });
    ring();
    if (move) document.getElementById("front").scrollIntoView({ block: "start" });
  };
  const chooseByHand = (index, move) => {
    isPicked = false;
    choose(index, move);
  };
  const pick = () => {
    const button = document.querySelector("[data-pick='balanced'] [data-show], [data-pick] [data-show]");
    choose(button ? Number(button.dataset.show) : Math.min(1, plans.length - 1));
  };
  // Points of other trials may lie over one of the front, which a click is meant for.
  const findNearest = ({ clientX, clientY }) => {
    const { left, top } = frontPlot.getBoundingClientRect();
    const { xaxis, yaxis } = frontPlot._fullLayout;
    let best = { place: -1, distance: 20 };
    for (const trace of frontPlot.data) {
      (trace.customdata ?? []).forEach((place, i) => {
        if (place < 0) return;
        const across = left + xaxis._offset + xaxis.d2p(trace.x[i]) - clientX;
        const down = top + yaxis._offset + yaxis.d2p(trace.y[i]) - clientY;
        const distance = Math.hypot(across, down);
        if (distance <= best.distance) best = { place, distance };
      });
    }
    return best.place;
  };
  const listen = () => {
    frontPlot.on("plotly_click", (event) => {
      const hit = findNearest(event.event);
      if (hit >= 0) chooseByHand(hit);
    });
    document.getElementById("chart-layers").on("plotly_click", (event) => {
      const { data: drawn, pointNumber } = event.points[0];
      chooseByHand(Math.floor(pointNumber[0] / drawn.meta)); // several rows of a plan
    });
    frontPlot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      if (step) { event.preventDefault(); chooseByHand(chosen + step); }
    });
  };

  // ---- Everything else that can be pressed ----
  const copy = async (button) => {
    const text = button.parentElement.querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
  const theme = document.getElementById("theme");
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("lpsearch-theme", root.dataset.theme); } catch { /* a file may have no storage */ }
    redraw();
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.classList.contains("copy")) copy(button);
    if (button?.dataset.show) chooseByHand(Number(button.dataset.show), true);
  });
  document.addEventListener("change", (event) => {
    if (!event.target.matches("[data-choice], #all-losses")) return;
    draw(charts.find((chart) => chart.element.contains(event.target)));
  });
  system.addEventListener("change", redraw);

  try {
    const kept = localStorage.getItem("lpsearch-theme");
    if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  } catch { /* a file may have no storage */ }
  collect();
  redraw();
  listen();
  pick();

  // ---- A page that is served live changes its body, then hands over the new figures ----
  document.addEventListener("lpsearch:figures", (event) => {
    data = event.detail;
    collect();
    const place = plans.findIndex((plan) => plan.dataset.trial === chosenTrial);
    chosen = place < 0 ? Math.min(chosen, plans.length - 1) : place;
    redraw();
    if (isPicked) pick(); else choose(chosen);
  });
})();
