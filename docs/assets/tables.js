// Tables are sorted by a click on a heading; those of many rows can be searched. Figures stay on one line, and text keeps
// a width to read it by: a narrow screen scrolls the table.
(() => {
  const MANY = 20;
  const [SHORT, LONG] = [14, 40];
  const SIZES = { "": 1, k: 1e3, M: 1e6, G: 1e9, T: 1e12 };

  function read(cell) {
    const text = cell ? cell.textContent.trim() : "";
    const found = text.match(/^([-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?)(?:\s([kMGT])\b)?/);
    return { text, number: found ? parseFloat(found[1].replaceAll(",", "")) * SIZES[found[2] || ""] : null };
  }

  function compare(a, b, sign) {
    const [none, other] = [a, b].map(({ text }) => ["", "-", "—", "none"].includes(text));
    if (none || other) return none - other; // what has no value is last in both directions
    const numbers = a.number !== null && b.number !== null;
    return sign * (numbers ? a.number - b.number : a.text.localeCompare(b.text));
  }

  function sort(table, heading, column) {
    const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => ({ row, key: read(row.cells[column]) }));
    rows.sort((a, b) => compare(a.key, b.key, sign));
    body.append(...rows.map(({ row }) => row));
  }

  function search(table) {
    const box = document.createElement("input");
    box.type = "search";
    box.className = "table-search";
    box.placeholder = "Show rows with these words";
    box.setAttribute("aria-label", box.placeholder);
    box.addEventListener("input", () => {
      const words = box.value.toLowerCase().split(/\s+/);
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
    });
    table.before(box);
  }

  document.addEventListener("DOMContentLoaded", () => {
    for (const table of document.querySelectorAll(".md-content table:not([class])")) {
      for (const cell of table.querySelectorAll("td")) {
        const { length } = cell.textContent;
        cell.classList.toggle("short", length <= SHORT);
        cell.classList.toggle("long", length > LONG);
      }
      const rows = table.tBodies[0]?.rows.length ?? 0;
      if (!table.tHead || rows < 3) continue;
      [...table.tHead.rows[0].cells].forEach((heading, column) => {
        if (!heading.textContent.trim()) return;
        const button = document.createElement("button");
        button.append(...heading.childNodes);
        button.title = "Sort";
        heading.append(button);
        button.addEventListener("click", () => sort(table, heading, column));
      });
      if (rows > MANY) search(table);
    }
  });
})();
