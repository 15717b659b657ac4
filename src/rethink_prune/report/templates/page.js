
"use strict";
// A click on a heading sorts its table: numbers by size, text by letters, empty cells last; a second click turns it round.
for (const table of document.querySelectorAll("table")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const direction = ascending ? 1 : -1;
    const rows = [...body.rows].map((row) => ({ row, cell: row.cells[column] }));
    const empty = ({ cell }) => cell.textContent.trim() === "";
    rows.sort((a, b) => {
      if (empty(a) || empty(b)) return empty(a) - empty(b);
      const [x, y] = [a.cell.dataset.number, b.cell.dataset.number];
      if (x !== undefined && y !== undefined) return direction * (Number(x) - Number(y));
      return direction * a.cell.textContent.localeCompare(b.cell.textContent, "en", { numeric: true });
    });
    body.append(...rows.map(({ row }) => row));
  }));
}
