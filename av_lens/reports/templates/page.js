(function () {
  "use strict";
  var themes = {{ themes | safe }};
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  function scale(colours) {
    return colours.map(function (colour, i) { return [i / (colours.length - 1), colour]; });
  }
  function recoloured(value, marks) {
    if (typeof value === "string") { return marks[value] || value; }
    if (Array.isArray(value)) { return value.map(function (item) { return recoloured(item, marks); }); }
    if (value && value.constructor === Object) {
      Object.keys(value).forEach(function (key) { value[key] = recoloured(value[key], marks); });
    }
    return value;
  }
  function themed(text) {
    var spec = JSON.parse(text), theme = themes[dark.matches ? "dark" : "light"], layout = spec.layout;
    layout.font.color = theme.ink;
    Object.keys(layout).forEach(function (key) {
      if (/^[xy]axis/.test(key)) {
        layout[key].gridcolor = layout[key].linecolor = layout[key].tickcolor = theme.grid;
        if (layout[key].zeroline) { layout[key].zerolinecolor = theme.ink; }
      }
    });
    (layout.shapes || []).forEach(function (shape) { if (shape.name === "ink") { shape.line.color = theme.ink; } });
    spec.data.forEach(function (trace) {
      var palette = (trace.meta || {}).palette;
      if (palette === "diverging") { trace.colorscale = scale(theme.diverging); }
      if (palette === "hatch") { trace.line.color = theme.hatch; }
      ["marker", "line", "error_x", "error_y"].forEach(function (part) { recoloured(trace[part], theme.marks); });
    });
    if (window.innerWidth < 640) { layout.margin = Object.assign({}, layout.margin, { l: 8, r: 8 }); layout.font.size = 11; }
    layout.width = undefined; layout.autosize = true;
    return spec;
  }
  var config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  function draw() {
    document.querySelectorAll(".plot").forEach(function (place) {
      var spec = themed(document.getElementById(place.dataset.spec).textContent);
      Plotly.react(place, spec.data, spec.layout, config);
    });
    document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
  }
  dark.addEventListener("change", draw);
  draw();
})();
