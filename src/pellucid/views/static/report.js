// Grids: arrow keys move between cells, and pointing at a cell says more about it. Code: a button copies it.
"use strict";

const tip = document.getElementById("tip");

function describe(cell) {
  const table = cell.closest("table"), row = cell.parentElement;
  const column = table.tHead.rows[0].cells[cell.cellIndex];
  const name = (axis, heading) => {
    const small = heading.querySelector("small");
    const token = heading.querySelector(".token");
    const main = token ? `“${token.textContent}”` : heading.textContent;
    return `${axis} ${main}` + (small ? ` (${small.textContent})` : "");
  };
  const title = `${name(table.tHead.rows[0].cells[0].textContent, row.cells[0])}, ${name(table.dataset.columns, column)}`;
  const lines = (cell.dataset.tip || `${table.dataset.name}\t${cell.textContent}`).split("\n");
  return [title, lines.map((line) => line.split("\t"))];
}

function show(cell) {
  const [title, lines] = describe(cell);
  const head = document.createElement("b"), body = document.createElement("table");
  head.textContent = title;
  for (const line of lines) {
    const row = body.insertRow();
    for (const word of line) row.insertCell().textContent = word;
  }
  tip.replaceChildren(head, body);
  tip.hidden = false;
  const at = cell.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const below = at.bottom + 8 + own.height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - own.width - 8))}px`;
  tip.style.top = `${below ? at.bottom + 8 : Math.max(8, at.top - own.height - 8)}px`;
  const table = cell.closest("table");
  table.querySelectorAll(".on").forEach((e) => e.classList.remove("on"));
  cell.parentElement.classList.add("on");
  table.tHead.rows[0].cells[cell.cellIndex].classList.add("on");
}

const hide = () => { tip.hidden = true; };

for (const table of document.querySelectorAll(".grid")) {
  const cells = [...table.tBodies[0].rows].map((row) => [...row.cells].slice(1));
  cells.flat().forEach((cell) => { cell.tabIndex = -1; });
  cells[cells.length - 1][cells[0].length - 1].tabIndex = 0;
  table.parentElement.scrollLeft = table.parentElement.scrollWidth;  // the answer is at the end
  const cellOf = (event) => event.target.closest("td");
  table.addEventListener("mouseover", (event) => { const cell = cellOf(event); cell ? show(cell) : hide(); });
  table.addEventListener("mouseleave", hide);
  table.addEventListener("focusin", (event) => {
    const cell = cellOf(event);
    if (!cell) return;
    cells.flat().forEach((c) => { c.tabIndex = c === cell ? 0 : -1; });
    show(cell);
  });
  table.addEventListener("focusout", hide);
  table.addEventListener("keydown", (event) => {
    const cell = cellOf(event), i = cells.findIndex((row) => row.includes(cell));
    if (event.key === "Escape") return hide();
    if (i < 0) return;
    const j = cells[i].indexOf(cell), last = cells[i].length - 1;
    const steps = { ArrowUp: [i - 1, j], ArrowDown: [i + 1, j], ArrowLeft: [i, j - 1], ArrowRight: [i, j + 1], Home: [i, 0], End: [i, last] };
    const [row, column] = steps[event.key] || [];
    if (row === undefined) return;
    event.preventDefault();
    cells[row]?.[column]?.focus();
  });
}

addEventListener("scroll", () => {
  const cell = document.activeElement.closest(".grid td");
  cell ? show(cell) : hide();
}, { passive: true, capture: true });

for (const block of document.querySelectorAll(".code")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.querySelector("pre").textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  block.append(button);
}
