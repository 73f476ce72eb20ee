"use strict";
// Tables that sort and charts that answer. The page says all it has to say without this script.
const number = (text) => {
  const found = text.replace(/[,\u202f\u00a0]/g, "").replace(/\u2212/g, "-").match(/^[<>+]? ?(-?\d+(?:\.\d+)?(?:e-?\d+)?)/);
  return found ? parseFloat(found[1]) : NaN;
};
const valueOf = (row, k) => {
  const cell = row.cells[k];
  return cell === undefined ? "" : (cell.dataset.v ?? cell.textContent).trim();
};
const sortBy = (table, k, up) => {
  const body = table.tBodies[0], rows = [...body.rows], absent = (v) => v === "" || v === "\u2013" || v === "None";
  const there = rows.map((r) => valueOf(r, k)).filter((v) => !absent(v));
  const numeric = there.every((v) => !Number.isNaN(number(v)));
  const order = (a, b) => {
    const v = valueOf(a, k), w = valueOf(b, k);
    if (absent(v) || absent(w)) return absent(v) - absent(w);
    return (up ? 1 : -1) * (numeric ? number(v) - number(w) : v.localeCompare(w));
  };
  body.append(...rows.sort(order));
  [...table.tHead.rows[0].cells].forEach((th, j) => {
    if (j === k) th.setAttribute("aria-sort", up ? "ascending" : "descending");
    else th.removeAttribute("aria-sort");
  });
};
const sortable = (table) => {
  if (table.tBodies[0].rows.length < 2) return;
  [...table.tHead.rows[0].cells].forEach((th, k) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...th.childNodes);
    th.append(button);
    button.addEventListener("click", () => sortBy(table, k, th.getAttribute("aria-sort") !== "ascending"));
  });
};
const chart = (svg) => {
  const points = [...svg.querySelectorAll(".pt")], said = svg.closest("figure")?.querySelector(".readout");
  if (!points.length || !said) return;
  said.textContent ||= "Point at a plot, or press Tab and the arrow keys, to read its values.";
  const show = (p) => {
    for (const other of points) other.classList.toggle("on", other === p);
    said.textContent = p.getAttribute("aria-label");
  };
  const order = points.every((p) => p.hasAttribute("cx"))
    ? [...points].sort((a, b) => a.getAttribute("cx") - b.getAttribute("cx")) : points;
  order.forEach((p, i) => {
    p.setAttribute("tabindex", i ? "-1" : "0");
    p.addEventListener("focus", () => show(p));
    p.addEventListener("pointerenter", () => show(p));
    p.addEventListener("keydown", (e) => {
      const to = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: order.length - 1 }[e.key];
      if (to === undefined) return;
      e.preventDefault();
      const next = order[Math.min(order.length - 1, Math.max(0, to))];
      for (const other of order) other.setAttribute("tabindex", other === next ? "0" : "-1");
      next.focus();
    });
  });
  if (!points[0].hasAttribute("cx")) return;
  svg.addEventListener("pointermove", (e) => {
    let best = null, least = Infinity;
    for (const p of points) {
      const box = p.getBoundingClientRect();
      const far = Math.hypot(box.x + box.width / 2 - e.clientX, box.y + box.height / 2 - e.clientY);
      if (far < least) [best, least] = [p, far];
    }
    show(best);
  });
};
const ready = (root) => {
  root.querySelectorAll("table.sort").forEach(sortable);
  root.querySelectorAll("svg.chart").forEach(chart);
};
ready(document);
addEventListener("beforeprint", () => {
  for (const d of document.querySelectorAll("details:not([open])")) { d.open = true; d.dataset.shut = ""; }
});
addEventListener("afterprint", () => {
  for (const d of document.querySelectorAll("details[data-shut]")) { d.open = false; delete d.dataset.shut; }
});
