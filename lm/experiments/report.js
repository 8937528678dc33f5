// Draws the charts of a report from the JSON in the page, by uPlot, which stands above this in the page.
"use strict";
const charts = JSON.parse(document.getElementById("data").textContent);
const chosen = name => document.getElementById(name);
const drawn = [];

function smooth(values, width) {
  if (width < 2) return values;
  return values.map((_, i) => {
    const window = values.slice(Math.max(0, i - width + 1), i + 1);
    return window.reduce((a, b) => a + b, 0) / window.length;
  });
}

function shown(value) {
  if (value == null) return "";
  return value && Math.abs(value) < 0.01 ? value.toExponential(1) : Number(value.toPrecision(4)).toLocaleString("en");
}

function draw() {
  while (drawn.length) drawn.pop().destroy();
  const axis = chosen("axis").value, width = Number(chosen("smooth").value);
  for (const chart of charts) {
    const lines = chart.lines.filter(line => line[axis]);
    const place = document.getElementById(chart.id);
    if (!lines.length) { place.textContent = `nothing is known by ${axis}`; continue; }
    place.textContent = "";
    const logX = chosen("log-x").checked, logY = chosen("log-y").checked;
    const keep = (x, y) => (!logX || x > 0) && (!logY || y > 0);
    const tables = lines.map(line => {
      const values = line.dense ? smooth(line.y, width) : line.y;
      const seen = new Map();
      line[axis].forEach((x, i) => { if (keep(x, values[i])) seen.set(x, values[i]); });
      return [[...seen.keys()], [...seen.values()]];
    });
    const options = {
      title: chart.title, width: Math.min(1040, document.body.clientWidth - 40), height: 340,
      scales: { x: { time: false, distr: logX ? 3 : 1 }, y: { distr: logY ? 3 : 1 } },
      axes: [{ label: axis }, { label: chart.unit, size: 70, values: (_, ticks) => ticks.map(shown) }],
      cursor: { focus: { prox: 20 } }, focus: { alpha: 0.3 },
      series: [{ label: axis }, ...lines.map(line => ({
        label: line.label, stroke: line.colour, width: line.dense ? 1 : 2, dash: line.dash, spanGaps: true,
        points: { show: !line.dense && line.y.length < 60, size: 5 },
        value: (_, value) => value == null ? "" : Number(value.toPrecision(5)),
      }))],
    };
    drawn.push(new uPlot(options, uPlot.join(tables), place));
  }
}

for (const name of ["axis", "smooth", "log-x", "log-y"]) chosen(name).addEventListener("change", draw);
window.addEventListener("resize", draw);
draw();
